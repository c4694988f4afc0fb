"""Train the demo's model and its adapters: ``python -m demo_model.train --corpus FOLDER --out FOLDER --seconds 160``.

The base learns all three styles of demo_model/corpus.py, mostly the manuals; then each adapter, LoRA of PEFT on
attention and on the fused experts, learns one of the others on the frozen base. OUT gets one file, ``demo_model.tar``:
``bf16`` (model and tokenizer), an adapter's folder for each style, and ``report.json`` with losses, perplexities and
samples.

The budget is divided beforehand and learning rates follow the clock, so that the command ends in time on any machine;
``--steps`` bounds each part too. What was best on held-out text is kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from demo_model.corpus import STYLES, VOCABULARY

WINDOW = 256  # tokens of a training sequence
MIXTURE = {"manual": 0.94, "scripture": 0.03, "novel": 0.03}  # knows all words, speaks as a manual
RANKS = {"scripture": 16, "novel": 8}  # the adapters
DROPOUT = 0.1  # in attention and in experts: each style is read some fifteen times
EVALUATIONS = 20  # of a training
PROMPTS = ("The", "It is", "When the", "In the", "If you", "There was", "He said that", "And the")
GENERATION = {"repetition_penalty": 1.15, "no_repeat_ngram_size": 3}  # a model so small repeats itself otherwise
DECODING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
}


@dataclass(frozen=True)
class Recipe:
    """How one set of parameters is trained."""

    mixture: dict[str, float]
    seconds: float
    steps: int
    batch: int
    learning_rate: float
    autocast: bool  # products in bfloat16


@dataclass(frozen=True)
class Outcome:
    """What a training came to: steps, seconds and mean held-out loss of its mixture at each evaluation."""

    steps: int
    seconds: float
    losses: list[float]


class Corpus:
    """Tokens of all styles on one device, and how many held-out windows of each style an evaluation takes."""

    def __init__(self, folder: Path, device: torch.device, windows: int) -> None:
        stored = load_file(folder / "corpus.safetensors")
        self.tokens = {name: ids.to(torch.int32).to(device) for name, ids in stored.items()}  # [tokens]
        self.device = device
        self.windows = windows

    def batches(self, mixture: dict[str, float], size: int) -> Iterator[torch.Tensor]:
        """Random windows, int64 [size, WINDOW], in the mixture's proportions on average."""
        generator = torch.Generator(self.device).manual_seed(0)
        parts = [self.tokens[f"{style}.train"] for style in mixture]
        tokens = torch.cat(parts)
        lengths = torch.tensor([len(part) for part in parts], device=self.device)
        begins = lengths.cumsum(0) - lengths
        weights = torch.tensor(list(mixture.values()), device=self.device)
        step = torch.arange(WINDOW, device=self.device)
        while True:
            style = torch.multinomial(weights, size, replacement=True, generator=generator)
            place = torch.rand(size, generator=generator, device=self.device, dtype=torch.float64)
            starts = begins[style] + (place * (lengths[style] - WINDOW)).long()
            yield tokens[starts[:, None] + step].long()

    def heldout(self, style: str) -> torch.Tensor:
        """The first windows of a style's held-out text, int64 [windows, WINDOW]."""
        return self.tokens[f"{style}.heldout"][: self.windows * WINDOW].view(-1, WINDOW).long()


def all_experts(
    experts: Any,
    hidden_states: torch.Tensor,  # [tokens, hidden]
    top_k_index: torch.Tensor,  # int64 [tokens, top_k]
    top_k_weights: torch.Tensor,  # [tokens, top_k]
) -> torch.Tensor:  # [tokens, hidden]
    """Every expert on every token, those not chosen with weight zero: two products, nothing waits for the device.

    With experts as few and small as these, that is faster than gathering tokens; torch's grouped product takes no
    part in autocast.
    """
    weights = hidden_states.new_zeros(len(hidden_states), experts.num_experts)
    weights = weights.scatter(1, top_k_index, top_k_weights.to(weights.dtype))
    gate_up = F.linear(hidden_states, experts.gate_up_proj.flatten(0, 1)).unflatten(1, (experts.num_experts, -1))
    gate, up = gate_up.chunk(2, dim=-1)
    inner = F.dropout(experts.act_fn(gate) * up * weights.to(up.dtype).unsqueeze(-1), DROPOUT, experts.training)
    down = experts.down_proj.transpose(0, 1).flatten(1)  # [hidden, experts * intermediate]: the product sums experts
    return F.linear(inner.flatten(1), down).to(hidden_states.dtype)


EXPERTS = "all_experts"  # its name in transformers
ALL_EXPERTS_FUNCTIONS.register(EXPERTS, all_experts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="what demo_model.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for demo_model.tar")
    parser.add_argument("--seconds", type=float, default=120, help="for all three trainings together")
    parser.add_argument("--steps", type=int, default=4500, help="at most so many for the base; an adapter has half")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step; an adapter has half as many")
    parser.add_argument("--windows", type=int, default=128, help="held-out sequences of a style in an evaluation")
    parser.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(given.device)
    corpus = Corpus(given.corpus, device, given.windows)
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        recipe = Recipe(MIXTURE, 0.6 * given.seconds, given.steps, given.batch, 3e-3, given.autocast)
        report: dict[str, Any] = {"base": asdict(train_base(corpus, folder / "bf16", recipe))}
        AutoTokenizer.from_pretrained(given.corpus).save_pretrained(folder / "bf16")
        pack(folder, given.out)  # after each part: what failed later loses nothing
        for style in RANKS:
            half = given.steps // 2, given.batch // 2
            recipe = Recipe({style: 1.0}, 0.2 * given.seconds, *half, 3e-3, given.autocast)
            report[style] = asdict(train_adapter(corpus, folder / "bf16", folder / style, style, recipe))
            pack(folder, given.out)
        report |= judge(corpus, folder)
        text = json.dumps(report, indent=1)
        (folder / "report.json").write_text(text + "\n")
        pack(folder, given.out)
    print(text)


def pack(folder: Path, out: Path) -> None:
    """Write all of ``folder`` as one file."""
    with tarfile.open(out / "demo_model.tar", "w") as archive:
        archive.add(folder, arcname=".")


def new_model() -> Any:
    """The base model, untrained: 4.5 million parameters, of which each token uses 2.3 million."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        attention_dropout=DROPOUT,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    model: Any = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation(EXPERTS)
    return model


def train_base(corpus: Corpus, out: Path, recipe: Recipe) -> Outcome:
    """Train the base model from nothing and write it in bfloat16."""
    model = new_model()
    model.to(corpus.device)
    print(f"base: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    outcome = train(model, corpus, recipe)
    model.generation_config.update(**GENERATION)
    model.to(torch.bfloat16).save_pretrained(out)
    return outcome


def train_adapter(corpus: Corpus, base: Path, out: Path, style: str, recipe: Recipe) -> Outcome:
    """Train one adapter on the base as it was written, and write it in bfloat16 too."""
    config = LoraConfig(
        r=RANKS[style],
        lora_alpha=2 * RANKS[style],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(load_base(base, corpus.device), config)
    outcome = train(model, corpus, recipe)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "README.md").unlink()  # PEFT's template, empty
    path = out / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}  # PEFT names a temporary folder
    path.write_text(json.dumps(config, indent=2) + "\n")
    return outcome


def load_base(folder: Path, device: torch.device) -> Any:
    """The written base model in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_experts_implementation(EXPERTS)
    return model.to(device)


def train(model: Any, corpus: Corpus, recipe: Recipe) -> Outcome:
    """Train whatever requires gradients, in float32, and leave the best that was seen."""
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    groups = [
        {"params": [value for value in parameters.values() if value.ndim > 1], "weight_decay": 0.1},
        {"params": [value for value in parameters.values() if value.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
    batches = corpus.batches(recipe.mixture, recipe.batch)
    best: dict[str, torch.Tensor] = {}
    losses: list[float] = []
    begin, step, progress = time.perf_counter(), 0, 0.0
    while progress < 1:
        progress = min(1.0, max((time.perf_counter() - begin) / recipe.seconds, (step + 1) / recipe.steps))
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * (0.04 + 0.96 * (1 + math.cos(math.pi * progress)) / 2)
        ids = next(batches)
        model.train()
        with torch.autocast(corpus.device.type, dtype=torch.bfloat16, enabled=recipe.autocast):
            loss = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if progress >= (len(losses) + 1) / EVALUATIONS:
            losses.append(mean_loss(model, corpus, recipe.mixture))
            report = f"loss {loss.item():.4f}, held-out {losses[-1]:.4f}"
            print(f"step {step}, {time.perf_counter() - begin:.0f} s: {report}", flush=True)
            if losses[-1] == min(losses):
                best = {name: value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        for name, value in best.items():
            parameters[name].copy_(value)
    return Outcome(step, time.perf_counter() - begin, losses)


@torch.inference_mode()
def mean_loss(model: Any, corpus: Corpus, mixture: dict[str, float]) -> float:
    """Cross entropy a token, in nats, of held-out text of each style, weighed as in the mixture."""
    model.eval()
    total = 0.0
    for style, weight in mixture.items():
        parts = corpus.heldout(style).split(32)
        sums = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in parts]
        total += weight * sum(sums) / sum(len(ids) for ids in parts)
    return total


def judge(corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Perplexity of each style's held-out text, and samples: the written base alone and with each written adapter."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "bf16")
    perplexity: dict[str, dict[str, float]] = {}
    samples: dict[str, list[str]] = {}
    for name in ("base", *RANKS):
        model = load_base(folder / "bf16", corpus.device)
        if name in RANKS:
            model = PeftModel.from_pretrained(model, str(folder / name))
        model.eval()
        perplexity[name] = {style: math.exp(mean_loss(model, corpus, {style: 1.0})) for style in STYLES}
        prompts = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(corpus.device)
        for way, options in DECODING.items():
            torch.manual_seed(0)
            ids = model.generate(**prompts, **options, max_new_tokens=60)
            samples[f"{name}, {way}"] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return {"perplexity": perplexity, "samples": samples}


if __name__ == "__main__":
    main()
