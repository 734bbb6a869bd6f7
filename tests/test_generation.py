from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

import heliostat.generation
from heliostat.generation import Generation, TransformersGenerator, VLLMGenerator

EOS, PAD, VOCABULARY = 1, 0, 12
PROMPTS = torch.tensor([[PAD, PAD, 5, 6], [7, 8, 9, 10], [PAD, 4, 3, 2]])
MASK = PROMPTS != PAD


def tiny_model(**settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    settings = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, **settings}
    config = GPT2Config(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD, **settings)
    return GPT2LMHeadModel(config)


def lora_model() -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


def draw(generator: Any, model: nn.Module, number: int = 3, seed: int = 0, **settings: Any) -> Generation:
    torch.manual_seed(seed)
    return generator.generate(model, PROMPTS, MASK, number, **{"eos_token_id": EOS, "pad_token_id": PAD, **settings})


def check_shape_of(drawn: Generation, longest: int) -> None:
    """Right padding, EOS once and last, and cut-off completions of full length."""
    ids, mask = drawn
    assert ids.shape == mask.shape
    assert ids.dtype == torch.long
    assert mask.dtype == torch.bool
    for tokens, kept in zip(ids.flatten(0, 1), mask.flatten(0, 1), strict=True):
        length = int(kept.sum())
        assert kept[:length].all()
        assert (tokens[length:] == PAD).all()
        ends = (tokens[:length] == EOS).nonzero()[:, 0].tolist()
        assert ends == [length - 1] if ends else length == longest


class TestTransformersGenerator:
    def test_completions_end_with_their_first_eos(self) -> None:
        model = tiny_model().train()
        drawn = draw(TransformersGenerator(8), model, 40)
        check_shape_of(drawn, 8)
        ended = (drawn.completion_ids == EOS).any(2)
        assert ended.any()
        assert not ended.all()
        assert all(module.training for module in model.modules())

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_samples_follow_the_policy_at_the_temperature(self, temperature: float) -> None:
        """Whatever the model's own generation config asks for, and although its dropout is on in training."""
        model = tiny_model(initializer_range=1.0, resid_pdrop=0.5)
        model.generation_config = GenerationConfig(top_k=1, repetition_penalty=5.0, do_sample=True)
        model.train()
        drawn = draw(TransformersGenerator(1, temperature=temperature), model, 4000)
        model.eval()
        for prompt, mask, tokens in zip(PROMPTS, MASK, drawn.completion_ids, strict=True):
            expected = (model(input_ids=prompt[mask][None]).logits[0, -1] / temperature).softmax(0)
            seen = tokens.flatten().bincount(minlength=VOCABULARY) / 4000
            assert (seen - expected).abs().max() < 0.03
        assert model.generation_config.top_k == 1

    def test_greedy_is_the_likeliest_and_padding_changes_nothing(self) -> None:
        model = tiny_model(initializer_range=1.0).eval()
        drawn = draw(TransformersGenerator(3), model, 1, greedy=True)
        for prompt, mask, tokens in zip(PROMPTS, MASK, drawn.completion_ids[:, 0], strict=True):
            ids = prompt[mask]
            for token in tokens:
                if token == PAD:
                    break
                assert token == model(input_ids=ids[None]).logits[0, -1].argmax()
                ids = torch.cat([ids, token[None]])

    def test_top_k_and_batches(self) -> None:
        model = tiny_model(initializer_range=1.0)
        expected = draw(TransformersGenerator(4), model, 1, greedy=True)
        drawn = draw(TransformersGenerator(4, top_k=1, batch_size=2), model, 3)  # 9 completions in 5 batches
        check_shape_of(drawn, 4)
        for number in range(3):
            assert torch.equal(drawn.completion_ids[:, number], expected.completion_ids[:, 0])

    @pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "mamba"])
    def test_cache_with_room_changes_nothing(self, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Attention to all tokens, in turns with a sliding window, and none at all."""
        torch.manual_seed(0)
        size = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "initializer_range": 1.0}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32}
        model: Any = {
            "gpt2": lambda: tiny_model(initializer_range=1.0),
            "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**size, **heads, sliding_window=5)),
            "mamba": lambda: MambaForCausalLM(MambaConfig(**size)),
        }[architecture]()
        drawn = draw(TransformersGenerator(8), model)
        monkeypatch.setattr(heliostat.generation, "_cache", lambda *_: None)
        expected = draw(TransformersGenerator(8), model)
        assert torch.equal(drawn.completion_ids, expected.completion_ids)

    def test_padding_may_be_eos(self) -> None:
        """As with tokenizers without a padding token: the mask is the same, and holds one EOS."""
        expected = draw(TransformersGenerator(8), tiny_model(), 20)
        ids, mask = draw(TransformersGenerator(8), tiny_model(), 20, pad_token_id=EOS)
        assert torch.equal(mask, expected.completion_mask)
        assert ((ids == EOS) & mask).sum(2).max() == 1
        assert (ids[~mask] == EOS).all()

    def test_lora_policy_samples_with_its_adapter(self) -> None:
        model = lora_model()
        before = draw(TransformersGenerator(6), model, 8)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=3.0)
        assert not torch.equal(draw(TransformersGenerator(6), model, 8).completion_ids, before.completion_ids)

    def test_prompts_beyond_the_context_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"prompt of 4 tokens and a completion of 13 exceed .* context of 16"):
            draw(TransformersGenerator(13), tiny_model())
        with pytest.raises(ValueError, match=r"prompts must have a token at least, got lengths \[0\]"):
            TransformersGenerator(2).generate(
                tiny_model(), PROMPTS[:1], torch.zeros(1, 4, dtype=torch.bool), 2, eos_token_id=EOS, pad_token_id=PAD
            )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
            ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
            ({"top_p": 0.0}, "top_p must be in"),
            ({"top_k": -1}, "top_k must be >= 0"),
            ({"batch_size": 0}, "batch_size must be >= 1"),
        ],
    )
    def test_wrong_settings(self, settings: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TransformersGenerator(**settings)
        if "batch_size" not in settings:
            with pytest.raises(ValueError, match=message):
                VLLMGenerator("http://localhost", "m", "w", **settings)

    def test_model_without_generate(self) -> None:
        with pytest.raises(ValueError, match="needs a model with generate, as those of transformers, got Linear"):
            draw(TransformersGenerator(), nn.Linear(2, 2))


class Server:
    """What vLLM's server does with the requests of a client, by a model of transformers that it reloads as it is told.

    Its completions are greedy, the i-th of a prompt one token longer than the one before it.
    """

    def __init__(self) -> None:
        self.model: Any = None
        self.requests: list[tuple[str, dict]] = []
        self.authorization: str | None = None
        self.answer: Any = None  # instead of the right one
        self.status = 200
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, body))
                server.authorization = self.headers["Authorization"]
                answer = server.respond(self.path, body)
                self.send_response(server.status)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def respond(self, path: str, body: dict) -> str:
        if path == "/v1/completions":
            return self.answer if self.answer is not None else json.dumps(self.complete(body))
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
        return ""

    def complete(self, body: dict) -> dict:
        choices = []
        for row, prompt in enumerate(body["prompt"]):
            for number in range(body["n"]):
                ids, finish = list(prompt), "length"
                while len(ids) - len(prompt) < min(number + 1, body["max_tokens"]):
                    ids.append(int(self.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
                    if ids[-1] in body["stop_token_ids"]:
                        finish = "stop"
                        break
                tokens = ids[len(prompt) :] if body["return_token_ids"] else None
                choices.append({"index": row * body["n"] + number, "token_ids": tokens, "finish_reason": finish})
        return {"choices": choices[::-1]}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


class TestVLLMGenerator:
    def test_completions_are_those_of_the_weights_of_now(self, server: Server, tmp_path: Path) -> None:
        model = tiny_model(initializer_range=1.0).eval()
        generator = VLLMGenerator(server.url, "m", tmp_path / "weights", max_new_tokens=4, top_p=0.9, api_key="secret")

        def expected(number: int) -> Tensor:
            greedy = draw(TransformersGenerator(number + 1), model, 1, greedy=True)
            return torch.nn.functional.pad(greedy.completion_ids[:, 0], (0, 4))[:, :4]

        for _ in range(2):
            drawn = draw(generator, model, 4)
            assert drawn.completion_mask.sum(2).max() <= 4
            for number in range(4):
                width = drawn.completion_ids.shape[2]
                assert torch.equal(drawn.completion_ids[:, number], expected(number)[:, :width])
            with torch.no_grad():  # as a step of training does
                model.transformer.wte.weight.add_(torch.randn_like(model.transformer.wte.weight))
        draw(generator, model, 4)
        draw(generator, model, 1, greedy=True)  # with the same weights
        paths = [path for path, _ in server.requests]
        update = ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
        assert paths == [*update * 3, "/v1/completions"]
        sampled, greedy = server.requests[2][1], server.requests[-1][1]
        assert sampled["prompt"] == [[5, 6], [7, 8, 9, 10], [4, 3, 2]]
        assert (sampled["model"], sampled["n"], sampled["temperature"], sampled["top_p"]) == ("m", 4, 1.0, 0.9)
        assert sampled["repetition_penalty"] == 1.0
        assert (greedy["temperature"], greedy["top_p"], greedy["n"]) == (0.0, 1.0, 1)
        assert server.authorization == "Bearer secret"

    def test_lora_policy_hands_over_its_adapter(self, server: Server, tmp_path: Path) -> None:
        server.model = tiny_model().eval()
        draw(VLLMGenerator(server.url, "m", tmp_path, max_new_tokens=2, lora_name="mine"), lora_model(), 2)
        (path, body), (_, request) = server.requests
        assert path == "/v1/load_lora_adapter"
        assert body == {"lora_name": "mine", "lora_path": str(tmp_path), "load_inplace": True}
        assert (tmp_path / "adapter_model.safetensors").is_file()
        assert request["model"] == "mine"

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ('{"choices": []}', "returned 0 choices for 3 prompts with n=2; 6 were expected"),
            ("{}", "returned no choices"),
            ("<html>", "no JSON object: <html>"),
            (json.dumps({"choices": [{"index": i, "text": ""} for i in range(6)]}), "no token_ids, .* vLLM 0.10.2"),
        ],
    )
    def test_wrong_answers(self, server: Server, tmp_path: Path, answer: str, message: str) -> None:
        server.answer = answer
        with pytest.raises(RuntimeError, match=message):
            draw(VLLMGenerator(server.url, "m", tmp_path), tiny_model(n_positions=512), 2)

    def test_refusals_and_no_server(self, server: Server, tmp_path: Path) -> None:
        server.status = 404
        model = tiny_model(n_positions=512)
        generator = VLLMGenerator(server.url, "m", tmp_path)
        with pytest.raises(RuntimeError, match=r"refused /collective_rpc with status 404.*VLLM_SERVER_DEV_MODE=1"):
            draw(generator, model)
        with pytest.raises(ConnectionError, match=r"no vLLM server answers at http://127.0.0.1:9/.*vllm serve m"):
            draw(VLLMGenerator("http://127.0.0.1:9", "m", tmp_path, timeout=2.0), model)
        with pytest.raises(ValueError, match=r"save_pretrained, which Embedding does not have"):
            draw(VLLMGenerator(server.url, "m", tmp_path), nn.Embedding(2, 2))
