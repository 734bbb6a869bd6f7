"""Sampling completions of prompts from a causal language model: in this process, or by a vLLM server.

Any object with the method and the attribute of `Generator` will do.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from heliostat._extras import require
from heliostat.components.distributed import default_group


class Generation(NamedTuple):
    """Completions of B prompts, G of each."""

    completion_ids: Tensor
    """Tokens ``(B, G, T)``, int64, padded on the right. A completion ends with EOS, unless it was cut off."""
    completion_mask: Tensor
    """Boolean ``(B, G, T)``: which tokens are no padding."""


class Generator(Protocol):
    """What draws completions."""

    temperature: float
    """Of the samples. Log-probabilities are taken at the same one."""

    def generate(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_generations: int,
        *,
        eos_token_id: int,
        pad_token_id: int,
        greedy: bool = False,
    ) -> Generation:
        """Draw ``num_generations`` completions of each prompt, or take the likeliest tokens if ``greedy``.

        Args:
            model: The policy as it is now.
            prompt_ids: ``(B, P)``, padded on the left.
            prompt_mask: Boolean ``(B, P)``.
            num_generations: G.
            eos_token_id: Ends a completion, and is its last token.
            pad_token_id: Fills up; may be that of EOS.
            greedy: Leave chance out.
        """
        ...


class TransformersGenerator:
    """Samples by ``generate`` of transformers, with a key-value cache.

    Whatever the model's own generation config says (repetition penalties, top-k, ...) is left out: what is drawn
    follows from the settings here alone, since policy gradients suppose samples of the policy itself. For the same
    reason ``top_p`` and ``top_k`` other than the default make the gradients those of another distribution. The model is
    in evaluation mode while it samples.

    Args:
        max_new_tokens: Longest completion, with EOS.
        temperature: > 0.
        top_p: Least probability of the likeliest tokens that are drawn from, in (0, 1].
        top_k: Number of the likeliest tokens that are drawn from; 0: all.
        batch_size: Completions drawn at a time; None: all of them.

    Raises:
        ValueError: Settings out of range; or, in ``generate``, prompts too long for the model's context.
    """

    def __init__(
        self,
        max_new_tokens: int = 256,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        batch_size: int | None = None,
    ) -> None:
        _check_settings(max_new_tokens, temperature, top_p, top_k)
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, or None for all completions at once, got {batch_size}")
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.top_p, self.top_k, self.batch_size = top_p, top_k, batch_size

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_generations: int,
        *,
        eos_token_id: int,
        pad_token_id: int,
        greedy: bool = False,
    ) -> Generation:
        """See `Generator`."""
        _check_context(model, prompt_mask, self.max_new_tokens)
        settings: dict[str, Any] = {"do_sample": False}
        if not greedy:
            settings = {
                "do_sample": True,
                "temperature": float(self.temperature),
                "top_p": float(self.top_p),
                "top_k": self.top_k,
            }
        # What follows EOS is overwritten; where it were padding, transformers would warn of it at every run.
        config = require("transformers", "TransformersGenerator").GenerationConfig(
            **settings, max_new_tokens=self.max_new_tokens, eos_token_id=eos_token_id, pad_token_id=eos_token_id
        )
        # Each row once for each of its completions: a batch may then be of any size.
        rows = torch.arange(len(prompt_ids), device=prompt_ids.device).repeat_interleave(num_generations)
        pieces = []
        with _sampling(model, config) as network:
            for part in rows.split(self.batch_size or len(rows)):
                ids = network.generate(
                    input_ids=prompt_ids[part],
                    attention_mask=prompt_mask[part].to(prompt_ids.dtype),
                    generation_config=config,
                    past_key_values=_cache(network, prompt_ids.shape[1] + self.max_new_tokens),
                )
                pieces.append(ids[:, prompt_ids.shape[1] :])
        longest = max(piece.shape[1] for piece in pieces)
        ids = torch.cat([F.pad(piece, (0, longest - piece.shape[1]), value=pad_token_id) for piece in pieces])
        lengths = torch.cat([torch.full_like(piece[:, 0], piece.shape[1]) for piece in pieces])
        return _group(ids, lengths, num_generations, eos_token_id, pad_token_id)


class VLLMGenerator:
    """Samples by a vLLM server, through its OpenAI-compatible API: token ids there and back, vLLM 0.10.2 or later.

    The server must learn of every change of the weights. Before completions are drawn from a model that has changed
    since, it is written to ``weights_dir``, a directory that training and server both see, and the server loads it:

    - a whole model by the ``reload_weights`` of its workers. The server runs with ``VLLM_SERVER_DEV_MODE=1``, and is of
      a version whose ``reload_weights`` takes ``weights_path``.
    - LoRA adapters of peft as the adapter ``lora_name``. The server runs with ``--enable-lora`` and
      ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``.

    Both switches let anyone who reaches the server change what it serves: keep it off open networks. On several
    processes the first one writes and has it loaded, and each asks for its own prompts. What the server's numerics make
    different from the policy's own probabilities is not corrected.

    Args:
        url: Of the server, such as ``"http://localhost:8000"``.
        model: Name of the model that is served.
        weights_dir: Where the weights are handed over.
        max_new_tokens: Longest completion, with EOS.
        temperature: > 0.
        top_p: See `TransformersGenerator`, so is the next.
        top_k: >= 0.
        lora_name: What the adapter is called, if the policy has one.
        api_key: Of the server, if it asks for one.
        timeout: Seconds to wait for an answer.

    Raises:
        ValueError: Settings out of range.
        ConnectionError: In ``generate``, if there is no server.
        RuntimeError: In ``generate``, if it refuses, or answers something else than what was asked for.
    """

    def __init__(
        self,
        url: str,
        model: str,
        weights_dir: str | Path,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        lora_name: str = "policy",
        api_key: str | None = None,
        timeout: float = 600.0,
    ) -> None:
        _check_settings(max_new_tokens, temperature, top_p, top_k)
        self.url, self.model, self.weights_dir = url.rstrip("/"), model, Path(weights_dir).absolute()
        self.max_new_tokens, self.temperature, self.top_p, self.top_k = max_new_tokens, temperature, top_p, top_k
        self.lora_name, self.api_key, self.timeout = lora_name, api_key, timeout
        self._version: int | None = None  # of the weights that the server has

    @torch.no_grad()
    def generate(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        num_generations: int,
        *,
        eos_token_id: int,
        pad_token_id: int,
        greedy: bool = False,
    ) -> Generation:
        """See `Generator`."""
        _check_context(model, prompt_mask, self.max_new_tokens)
        self._hand_over(model)
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
        request = {
            "model": self.lora_name if is_peft(model) else self.model,
            "prompt": prompts,
            "n": num_generations,
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0 if greedy else self.temperature,
            "top_p": 1.0 if greedy else self.top_p,
            "top_k": 0 if greedy else self.top_k,
            # What is not given is taken from the model's own generation config.
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": [eos_token_id],
            "return_token_ids": True,
        }
        if not greedy:  # drawn here, so that a run is seeded as it is without a server
            request["seed"] = int(torch.randint(2**31, ()))
        choices = self._post("/v1/completions", request).get("choices")
        wanted = len(prompts) * num_generations
        if not isinstance(choices, list) or len(choices) != wanted:
            raise RuntimeError(
                f"the vLLM server at {self.url} returned {len(choices) if isinstance(choices, list) else 'no'} choices "
                f"for {len(prompts)} prompts with n={num_generations}; {wanted} were expected"
            )
        completions = [choice.get("token_ids") for choice in sorted(choices, key=lambda choice: choice["index"])]
        if any(completion is None for completion in completions):
            raise RuntimeError(
                f"the vLLM server at {self.url} returned no token_ids, which return_token_ids=true asks for: use vLLM "
                "0.10.2 or later"
            )
        longest = max([1, *map(len, completions)])
        ids = torch.tensor([tokens + [pad_token_id] * (longest - len(tokens)) for tokens in completions])
        lengths = torch.tensor([len(tokens) for tokens in completions])
        return _group(
            ids.to(prompt_ids.device), lengths.to(prompt_ids.device), num_generations, eos_token_id, pad_token_id
        )

    def _hand_over(self, model: Any) -> None:
        # Every change of a parameter in place, which all optimizers make, counts its version up.
        version = sum(parameter._version for parameter in model.parameters())
        if version == self._version:
            return
        group = default_group()
        if group is None or dist.get_rank() == 0:
            if not hasattr(model, "save_pretrained"):
                raise ValueError(
                    f"VLLMGenerator writes the policy by its save_pretrained, which {type(model).__name__} does not "
                    "have: use a model of transformers, or TransformersGenerator"
                )
            model.save_pretrained(str(self.weights_dir))
            if is_peft(model):
                adapter = {"lora_name": self.lora_name, "lora_path": str(self.weights_dir), "load_inplace": True}
                self._post("/v1/load_lora_adapter", adapter)
            else:
                arguments = {"weights_path": str(self.weights_dir)}
                self._post("/collective_rpc", {"method": "reload_weights", "kwargs": arguments})
                self._post("/reset_prefix_cache", {})
        if group is not None:
            dist.barrier(group=group)
        self._version = version

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                answer = response.read().decode()
        except urllib.error.HTTPError as error:
            hint = _SWITCHES.get(path, "") if error.code == 404 else ""
            raise RuntimeError(
                f"the vLLM server at {self.url} refused {path} with status {error.code}: "
                f"{error.read().decode(errors='replace'):.500}{hint}"
            ) from error
        except OSError as error:  # URLError and timeouts are OSErrors
            raise ConnectionError(
                f"no vLLM server answers at {self.url}{path} ({error}): start one by `vllm serve {self.model}`, or "
                "raise timeout"
            ) from error
        if path != "/v1/completions":  # the others answer nothing, or a word
            return {}
        try:
            parsed = json.loads(answer)
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            raise RuntimeError(f"the vLLM server at {self.url} answered {path} by no JSON object: {answer:.200}")
        return parsed


_SWITCHES = {
    "/collective_rpc": ". It has this only under VLLM_SERVER_DEV_MODE=1",
    "/reset_prefix_cache": ". It has this only under VLLM_SERVER_DEV_MODE=1",
    "/v1/load_lora_adapter": ". It has this only under VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora",
}


def context_length(model: Any) -> int | None:
    """How many tokens a model of transformers can take, None if it does not say."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()  # type: ignore[union-attr]
    return getattr(config, "max_position_embeddings", None)


def is_peft(model: nn.Module) -> bool:
    """Whether it is a model that peft has put adapters into."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """With the model in evaluation mode, and each part of it back in its own afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _check_context(model: nn.Module, prompt_mask: Tensor, max_new_tokens: int) -> None:
    lengths = prompt_mask.sum(1)
    if len(lengths) == 0 or int(lengths.min()) == 0:
        raise ValueError(f"prompts must have a token at least, got lengths {lengths.tolist()}")
    context = context_length(model)
    if context is not None and int(lengths.max()) + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {int(lengths.max())} tokens and a completion of {max_new_tokens} exceed the model's context "
            f"of {context} tokens: lower max_new_tokens of the generator, or max_prompt_length of the data module"
        )


def _check_settings(max_new_tokens: int, temperature: float, top_p: float, top_k: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {max_new_tokens}")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; evaluation is greedy by itself")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, 0 for all tokens, got {top_k}")


@contextmanager
def _sampling(model: Any, config: Any) -> Iterator[Any]:
    """The network that samples, in evaluation mode and with no generation config but ``config``."""
    network = model.get_base_model() if is_peft(model) else model
    if not hasattr(network, "generate"):
        raise ValueError(
            f"TransformersGenerator needs a model with generate, as those of transformers, got {type(network).__name__}"
        )
    own, network.generation_config = network.generation_config, config  # which would fill in what ours leaves open
    try:
        with evaluating(network):
            yield network
    finally:
        network.generation_config = own


def _cache(network: Any, length: int) -> Any:
    """A cache that has room for ``length`` tokens from the start, or None to leave it to transformers.

    That of transformers grows by a copy of all keys and values at each token, which takes longer than the attention.
    """
    supported = getattr(network, "_supports_default_dynamic_cache", None)
    if supported is None or not supported():
        return None
    try:
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache: Any = DynamicCache(config=network.config)
    except (ImportError, TypeError):  # transformers before 4.56
        return None
    if not any(type(layer) is DynamicLayer for layer in cache.layers):  # none that looks at all tokens
        return None

    class Layer(DynamicLayer):
        """Writes new keys and values behind the old ones; what it returns is a view."""

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if start == 0:
                self.lazy_initialization(key_states, value_states)
                self.rooms = [
                    states.new_empty(*states.shape[:-2], max(length, end), states.shape[-1])
                    for states in (key_states, value_states)
                ]
            for room, states in zip(self.rooms, (key_states, value_states), strict=True):
                room[..., start:end, :] = states
            self.keys, self.values = (room[..., :end, :] for room in self.rooms)
            return self.keys, self.values

    cache.layers = [Layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _group(ids: Tensor, lengths: Tensor, num_generations: int, eos_token_id: int, pad_token_id: int) -> Generation:
    """Cut ``(B * G, T)`` off behind the first EOS and group them."""
    is_eos = ids == eos_token_id
    mask = is_eos.cumsum(1) - is_eos.long() == 0
    mask &= torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    width = max(1, int(mask.sum(1).max()))
    ids, mask = ids.where(mask, pad_token_id)[:, :width], mask[:, :width]
    shape = (len(ids) // num_generations, num_generations, width)
    return Generation(ids.reshape(shape), mask.reshape(shape))
