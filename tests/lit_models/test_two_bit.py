from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import BertModel

from heliostat import BitsReport, TwoBitEncoder
from heliostat.components import TwoBitLinear, pool_tokens, quantize_model
from heliostat.lit_models.two_bit import VARIANTS
from heliostat.pretrained import load_tokenizer
from tests.harness import ModuleContract, quiet_trainer, weights
from tests.lit_models.test_whitened_cse import data, tiny_encoder, write_files

MIX = "2/4/16-bit, compensated"


def original() -> BertModel:
    """Of one block."""
    encoder = tiny_encoder(0.0).eval()
    encoder.encoder.layer = encoder.encoder.layer[:1]
    encoder.config.num_hidden_layers = 1
    return encoder


def module(**settings: object) -> TwoBitEncoder:
    settings.setdefault("variant", MIX)
    return TwoBitEncoder(original(), load_tokenizer("minilm"), calibration_batches=2, **settings)


class TestTwoBitEncoder(ModuleContract):
    def module(self, *, dropout: bool = True) -> LightningModule:
        torch.manual_seed(1)
        sgd = {} if dropout else {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}
        return module(**sgd)

    def data(self, directory: Path) -> LightningDataModule:
        return data(write_files(directory))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("text"))


def test_variants_are_compared_one_is_taken_tuned_saved_and_loaded(tmp_path: Path, files: Path, capsys) -> None:
    chosen = module(variant="auto", max_drop=2.0)
    dense = original()
    trainer = quiet_trainer(tmp_path, max_steps=3, num_sanity_val_steps=-1, callbacks=[BitsReport()])
    text = data(files, eval_batch_size=5)
    trainer.fit(chosen, text)
    results = chosen.results
    assert list(results) == ["float32", *VARIANTS, f"{chosen.chosen}, tuned"]
    assert chosen.chosen.startswith("2-bit")  # any drop is allowed, so the fewest bits win
    assert results["float32"][0] == 32
    assert results["float32"].cosine == pytest.approx(1)
    for mix in ("2-bit", "4-bit"):
        assert results[f"{mix}, compensated"].average_bits == results[f"{mix}, to nearest"].average_bits
    bits = [results[f"{mix}, to nearest"].average_bits for mix in ("2-bit", "2/4/16-bit", "4-bit", "2-bit")]
    assert bits[0] < bits[1] < bits[2]
    assert results["4-bit, to nearest"].cosine > results["2-bit, to nearest"].cosine
    assert f"{chosen.chosen} " in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"two_bit.png", "two_bit.csv"}
    assert "calibrated" not in dict(chosen.named_parameters())
    assert all(
        torch.equal(p, chosen.encoder.get_parameter(n))
        for n, p in dense.named_parameters()
        if "emb" in n and p.ndim > 1
    )

    checkpoint = tmp_path / "checkpoint.ckpt"
    trainer.save_checkpoint(checkpoint)
    again = module(variant="4-bit, to nearest")
    quiet_trainer(tmp_path).validate(again, text, ckpt_path=checkpoint, verbose=False)
    expected = chosen.encode(["Return the first line", "Close the file"])
    assert torch.equal(again.encode(["Return the first line", "Close the file"]), expected)
    assert (again.chosen, again.results) == (chosen.chosen, results)

    chosen.save_pretrained(tmp_path / "model")
    size = (tmp_path / "model" / "two_bit.safetensors").stat().st_size
    assert size == pytest.approx(1e6 * results[chosen.chosen].megabytes, rel=0.05)
    loaded = TwoBitEncoder(str(tmp_path / "model"))
    torch.testing.assert_close(loaded.encode(["Return the first line", "Close the file"]), expected, rtol=0, atol=5e-3)
    with pytest.raises(MisconfigurationException, match="quantised already"):
        quiet_trainer(tmp_path, max_steps=1).fit(loaded, text)


def test_rate_of_zero_leaves_what_quantize_model_makes(tmp_path: Path, files: Path) -> None:
    """And the calibration is on the first batches of the training, which goes on as without it."""
    text, frozen = data(files), module(optimizer=lambda params: torch.optim.SGD(params, lr=0.0))
    trainer = quiet_trainer(tmp_path, max_steps=1, precision="64-true")
    trainer.fit(frozen, text)
    dense, expected = original().double(), original().double()
    batches = list(text.train_dataloader())
    quantize_model(expected, calibration=batches, max_batches=2, **VARIANTS[MIX])
    actual = weights(frozen)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual[f"encoder.{name}"], tensor), name
    first, mask = batches[0], batches[0]["attention_mask"]
    pooled = [pool_tokens([network(**first).last_hidden_state], mask, "mean") for network in (expected, dense)]
    loss = (1 - torch.nn.functional.cosine_similarity(*pooled)).mean()
    assert trainer.callback_metrics["train/loss"] == pytest.approx(float(loss), rel=1e-4)


def test_automatic_choice(files: Path, tmp_path: Path) -> None:
    picky = module(variant="auto", max_drop=1e-9)
    quiet_trainer(tmp_path, max_steps=1, num_sanity_val_steps=-1).fit(picky, data(files))
    quantized = {name: picky.results[name].spearman for name in VARIANTS}
    least = picky.results["float32"].spearman - 1e-9
    good = [name for name, spearman in quantized.items() if spearman >= least]
    if good:
        assert picky.results[picky.chosen][0] == min(picky.results[name][0] for name in good)
    else:
        assert quantized[picky.chosen] == max(quantized.values())
    with pytest.raises(MisconfigurationException, match="num_sanity_val_steps to -1"):
        quiet_trainer(tmp_path, max_steps=1).fit(module(variant="auto"), data(files))


def test_new_module_is_quantised_to_nearest_and_excluded_layers_stay() -> None:
    new = module(variant="4-bit, compensated", exclude="*.output.dense")
    kinds = {
        name: type(layer) for name, layer in new.encoder.named_modules() if name.endswith((".query", ".output.dense"))
    }
    assert {kind is TwoBitLinear for name, kind in kinds.items() if name.endswith("query")} == {True}
    assert TwoBitLinear not in {kind for name, kind in kinds.items() if name.endswith("output.dense")}
    four = original()
    quantize_model(four, exclude="*.output.dense", four_bit_fraction=1.0, outlier_fraction=0.0)
    assert torch.equal(
        new.encoder.encoder.layer[0].intermediate.dense.codes, four.encoder.layer[0].intermediate.dense.codes
    )
    assert math.isfinite(float(new.encode("Open the file").sum()))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"variant": "3-bit"}, "variant must be 'auto' or one of"),
        ({"max_drop": 0.0}, "max_drop must be > 0"),
        ({"pooling": "mean_top2"}, "pooling must be"),
        ({"num_layers": 1}, "num_layers cuts an encoder given by name"),
    ],
)
def test_wrong_settings(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        module(**settings)
