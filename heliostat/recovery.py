"""Alignment recovery (arXiv 2504.09757) of saved language models: what `heliostat recover` does."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from heliostat._extras import require
from heliostat.callbacks._recovery import block_output, find_layout, read_reference, report, run_recovery, table
from heliostat.components.alignment_recovery import RecoveryResult


def recover_checkpoint(
    checkpoint: str | Path,
    aligned: str | Path,
    output: str | Path,
    harmful_prompts: Sequence[str] | str | Path,
    task_examples: Sequence[Mapping[str, str]] | str | Path,
    *,
    task_score: Callable[[Any], float] | None = None,
    harmful_rate: Callable[[Any], float] | None = None,
    layers: str | Sequence[str] | None = None,
    layer_end: int | None = None,
    exclude: Sequence[str] = (),
    batch_size: int = 8,
    max_length: int = 512,
    device: str | torch.device | None = None,
    **settings: Any,
) -> RecoveryResult:
    """Recover a saved causal language model of transformers, and save the result beside a report.

    Works in float32; the result is saved in the precision of the checkpoint's weights. Prompts are taken as they are
    written: put the chat template into them.

    Args:
        checkpoint: Directory of the fine-tuned model, or of a LoRA adapter of peft, whose base is ``aligned``.
        aligned: Directory of the aligned model, with safetensors weights, which are read one at a time.
        output: Directory to write; must not exist, or be empty.
        harmful_prompts: Texts, or a file: ``.jsonl`` with a field ``prompt``, or any other with one prompt a line.
        task_examples: Dicts with ``prompt`` and ``answer``, or a ``.jsonl`` file of them.
        task_score: Called with the model, returns a number. Default: the share of the answers' tokens that the model
            predicts rightly after the prompt and the tokens before.
        harmful_rate: Called with the model at every candidate; reported only.
        layers: See `AlignmentRecovery`.
        layer_end: See `AlignmentRecovery`.
        exclude: See `AlignmentRecovery`.
        batch_size: Prompts a batch; part of the method.
        max_length: Tokens kept of a text, its last ones.
        device: Default: CUDA if there is one.
        **settings: As of `heliostat.components.recover_alignment`.

    Returns:
        What was done.

    Raises:
        MisconfigurationException: As `AlignmentRecovery` does.
        ValueError: On settings out of range, or files that do not have what is needed.
    """
    transformers = require("transformers", "recover_checkpoint")
    checkpoint, aligned, output = Path(checkpoint), Path(aligned), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists. Name a new directory")
    prompts = [row["prompt"] for row in _rows(harmful_prompts, "harmful_prompts", ("prompt",))]
    examples = _rows(task_examples, "task_examples", ("prompt", "answer"))
    is_adapter = (checkpoint / "adapter_config.json").is_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(aligned if is_adapter else checkpoint)
    saved_as = next(p.dtype for p in model.parameters())
    if is_adapter:
        model = require("peft", "A LoRA adapter").PeftModel.from_pretrained(model, checkpoint)
    layout = find_layout(model, layers, layer_end, exclude, "", fixed=False)
    model.float().eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer_at = checkpoint if (checkpoint / "tokenizer_config.json").is_file() else aligned
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_at)

    def batches(texts: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
        return [_padded(texts[i : i + batch_size], model.device) for i in range(0, len(texts), batch_size)]

    def encode(text: str) -> list[int]:
        return tokenizer(text)["input_ids"][-max_length:]

    def answers_predicted() -> float:
        right = total = 0
        for start in range(0, len(examples), batch_size):
            pairs = [
                (encode(e["prompt"]), tokenizer(e["answer"], add_special_tokens=False)["input_ids"])
                for e in examples[start : start + batch_size]
            ]
            batch = _padded([[*prompt, *answer] for prompt, answer in pairs], model.device)
            predicted = model(**batch).logits.argmax(-1).cpu()
            for row, (prompt, answer) in zip(predicted, pairs, strict=True):
                own = row[len(prompt) - 1 :][: len(answer)]
                right, total = right + int((own == torch.tensor(answer)).sum()), total + len(answer)
        return right / total

    result = run_recovery(
        model,
        layout,
        read_reference(aligned, model, layout),
        lambda batch: block_output(model, layout, batch, "last"),
        batches([encode(prompt) for prompt in prompts]),
        batches([encode(example["prompt"]) for example in examples]),
        answers_predicted if task_score is None else functools.partial(task_score, model),
        harmful_rate=functools.partial(harmful_rate, model) if harmful_rate else None,
        settings=settings,
    )
    rank_zero_info(table(result))
    model = model.merge_and_unload() if is_adapter else model  # the adapter is zero: nothing but the wrapping goes
    model.to(saved_as).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "alignment_recovery.json").write_text(json.dumps(report(result), indent=1), encoding="utf-8")
    return result


def _padded(texts: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Token ids padded on the right, with their mask."""
    length = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _rows(source: Sequence[Any] | str | Path, name: str, fields: Sequence[str]) -> list[dict[str, str]]:
    if isinstance(source, (str, Path)):
        lines = [line for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        source = [json.loads(line) for line in lines] if Path(source).suffix == ".jsonl" else lines
    rows = [{"prompt": row} if isinstance(row, str) else dict(row) for row in source]
    for number, row in enumerate(rows, start=1):
        if missing := [field for field in fields if not row.get(field)]:
            raise ValueError(f"{name}: entry {number} has no {' and '.join(missing)}; it has {', '.join(row)}")
    if not rows:
        raise ValueError(f"{name} is empty")
    return rows
