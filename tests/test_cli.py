"""The command line, run in this process: what it prints, its JSON, and one line for what it refuses."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

import quant_moelora
from quant_moelora.cli import app, main
from tests.commands import Command, Run, error_line

# Its log handler keeps the stderr of the first import, which must not be that of a test.
importlib.import_module("transformers")

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
CHECKPOINT = GOLDEN / "checkpoints" / "gptq-qwen3moe-int4-g32-asym"
MODEL = str(CHECKPOINT)
A, B = (GOLDEN / "adapters" / name for name in ("lora-tp-rslora-qwen3moe-r8", "lora-mod-qwen3moe-r4"))
ADAPTERS = [f"--adapter=a={A}", f"--adapter=b={B}"]
NO_CUDA = [] if torch.cuda.is_available() else ["device cpu is no CUDA device"]  # what backends with kernels say
QUANTISED = ["w13 is quantised", "w2 is quantised"]
PROMPT = "t69 t250 t133"
LAYER_FIELDS = {
    "layers",
    "num_experts",
    "hidden_size",
    "intermediate_size",
    "inter_pad",
    "activation",
    "scheme",
    "formats",
    "packed_bytes",
    "backends",
}


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_a_checkpoint_holds(command: Command) -> None:
    run = command("inspect", MODEL)
    assert run.code == 0 and not run.err
    bytes_on_disk = (CHECKPOINT / "model.safetensors").stat().st_size
    for part in (
        f"{MODEL}: qwen3_moe, {bytes_on_disk:,} bytes on disk",
        "layers 0-1: 8 experts, hidden 128, intermediate 96 (padded 128), silu",
        *(f"{projection} gptq w4a16_g32_asym" for projection in ("gate", "up", "down")),
        "backend cpu: serves it",
        "quantised linear layers beside the experts: 8",
    ):
        assert part in run.out, run.out


def test_inspect_json(command: Command) -> None:
    found = command("inspect", MODEL, "--json").json
    assert found.keys() == {"path", "model_type", "bytes", "quant_method", "experts", "quantized_linears"}
    assert (found["path"], found["model_type"], found["quant_method"]) == (MODEL, "qwen3_moe", "gptq")
    assert found["quantized_linears"] == 8, "q, k, v and o of two layers"
    (layer,) = found["experts"]
    assert layer.keys() == LAYER_FIELDS
    # codes, and for each group of 32 columns of each padded row a 16-bit scale and zero point
    packed = 8 * (256 * 128 // 2 + 256 * 4 * 4) + 8 * (128 * 128 // 2 + 128 * 4 * 4)
    assert layer["packed_bytes"] == packed
    assert layer == {
        "layers": [0, 1],
        "num_experts": 8,
        "hidden_size": 128,
        "intermediate_size": 96,
        "inter_pad": 128,
        "activation": "silu",
        "scheme": "w4a16_g32_asym",
        "formats": dict.fromkeys(("gate", "up", "down"), "gptq w4a16_g32_asym"),
        "packed_bytes": packed,
        "backends": {"marlin": NO_CUDA, "unquantized": NO_CUDA + QUANTISED, "cpu": [], "reference": []},
    }


EXPECTED = {  # quant_method, scheme, layers, quantised linears, model type
    "awq-qwen3moe-int4-g128": ("awq", "w4a16_g128_asym", [0], 4, "qwen3_moe"),
    "base-mixtral-h128-i128": (None, "none", [0, 1], 0, "mixtral"),
    "base-qwen3moe-h128-i96": (None, "none", [0, 1], 0, "qwen3_moe"),
    "ct-mixtral-w4a16-g128-sym-rtn": ("compressed-tensors", "w4a16_g128_sym", [0, 1], 0, "mixtral"),
    "ct-old-mixtral-w4a16-g32-actorder-group": ("compressed-tensors", "w4a16_g32_sym", [0, 1], 8, "mixtral"),
    "ct-qwen3moe-w4a16-g32-asym-rtn": ("compressed-tensors", "w4a16_g32_asym", [0, 1], 0, "qwen3_moe"),
    "gptq-mixtral-int4-g32-descact": ("gptq", "w4a16_g32_sym", [0, 1], 8, "mixtral"),
    "gptq_v2-qwen3moe-int4-g32-asym": ("gptq", "w4a16_g32_asym", [0, 1], 8, "qwen3_moe"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_inspect_json_of_every_golden_checkpoint(command: Command, golden: Path, name: str) -> None:
    method, scheme, layers, linears, model_type = EXPECTED[name]
    found = command("inspect", "--json", str(golden / "checkpoints" / name)).json
    assert (found["quant_method"], found["model_type"]) == (method, model_type)
    (layer,) = found["experts"]
    assert layer.keys() == LAYER_FIELDS
    assert (layer["scheme"], layer["layers"], found["quantized_linears"]) == (scheme, layers, linears)
    against = layer["backends"]
    assert against.keys() == {"marlin", "unquantized", "cpu", "reference"} and against["reference"] == []
    unquantised = [f"{name} is not quantised" for name in ("w13", "w2")]
    assert [reason for reason in against["marlin"] if reason.endswith("quantised")] == unquantised * (scheme == "none")
    assert against["marlin"][: len(NO_CUDA)] == NO_CUDA and against["cpu"] == unquantised * (scheme == "none")


def edited(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


EXPERT = "model.layers.1.mlp.experts.6.up_proj"


@pytest.mark.parametrize("verb", ["inspect", "generate"])
def test_a_truncated_tensor_is_one_line(command: Command, tmp_path: Path, verb: str) -> None:
    """It names the tensor, its file, the rule it breaks and the remedy."""

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.qweight"] = tensors[f"{EXPERT}.qweight"][:, :64].clone()

    folder = str(edited(tmp_path / "m", cut))
    run = command(verb, folder) if verb == "inspect" else command(verb, "--model", folder, "--prompt", PROMPT)
    line = error_line(run)
    for part in (f"{EXPERT}.qweight", "model.safetensors", "[16, 64]", "[16, 96]", "N=96, K=128", "config.json names"):
        assert part in line


def test_a_missing_expert_is_one_line(command: Command, tmp_path: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[f"{EXPERT}.{suffix}"]

    line = error_line(command("inspect", str(edited(tmp_path / "m", drop))))
    for part in ("up projection of expert 6 in layer 1", str(tmp_path / "m"), "1 of 24", "download"):
        assert part in line


def test_a_misshapen_tensor_beside_the_experts_is_one_line(command: Command, tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:64].clone()

    folder = str(edited(tmp_path / "m", cut))
    run = command("generate", "--model", folder, "--prompt", PROMPT)
    assert run.code == 2 and not run.out
    assert "error: " in run.err and "model.norm.weight" in run.err and "Traceback" not in run.err


def test_other_refusals_are_one_line(command: Command, tmp_path: Path) -> None:
    assert "no-such/folder" in error_line(command("inspect", "no-such/folder"))
    assert "config.json" in error_line(command("inspect", str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert "model.safetensors" in error_line(command("inspect", str(tmp_path)))
    shutil.copy(CHECKPOINT / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "not_a_model"}')
    assert "not_a_model" in error_line(command("inspect", str(tmp_path)))


def test_as_a_program(tmp_path: Path) -> None:
    """Exit code and streams of a process of its own."""
    command = [sys.executable, "-m", "quant_moelora.cli", "inspect", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "config.json" in error_line(Run(done.returncode, done.stdout, done.stderr))


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_prints_a_row_a_projection_and_the_verdicts(command: Command) -> None:
    run = command("verify", MODEL)
    assert run.code == 0
    lines = [line.split() for line in run.out.splitlines()]
    rows = [line for line in lines if len(line) == 9 and line[2] == "w4a16_g32_asym"]
    assert [(row[0], row[1]) for row in rows] == [(n, p) for n in "01" for p in ("gate", "up", "down")]
    assert all(row[6] == "0.00%" and row[7].endswith("%") and row[8] == "-" for row in rows)
    assert run.out.splitlines()[0] == f"{MODEL}: qwen3_moe, bfloat16"
    assert "layers 0-1: backend cpu in bfloat16: loses nothing" in run.out
    assert run.out.splitlines()[-1].startswith("ok: logits differ")


def test_verify_json_against_the_base(command: Command, golden: Path) -> None:
    folders = [str(golden / "checkpoints" / n) for n in ("ct-qwen3moe-w4a16-g32-asym-rtn", "base-qwen3moe-h128-i96")]
    run = command("verify", folders[0], "--against", folders[1], "--json")
    assert run.code == 0
    found = run.json
    simple = {name: value for name, value in found.items() if name not in ("projections", "backends", "parity")}
    assert simple == {
        "ok": True,
        "path": folders[0],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "against": folders[1],
        "parity_bound": 1e-4,
    }
    assert 0 <= found["parity"] < 1e-5
    assert found["backends"] == [{"layer": n, "backend": "cpu", "lossy": None} for n in (0, 1)]
    assert len(found["projections"]) == 6
    for row in found["projections"]:
        assert row.keys() == {
            *("layer", "projection", "scheme", "minimum", "maximum", "rms", "zero_scales", "end_codes"),
            "relative_error",
        }
        assert 0.07 < row["relative_error"] < 0.12


def test_verify_refuses_in_one_line(command: Command, golden: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.scales"][0, 3] = float("nan")

    def cut(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{EXPERT}.qweight"] = tensors[f"{EXPERT}.qweight"][:, :64].clone()

    assert f"scales of {EXPERT}" in error_line(command("verify", str(edited(tmp_path / "nan", spoil))))
    assert f"{EXPERT}.qweight" in error_line(command("verify", "--json", str(edited(tmp_path / "cut", cut))))
    other = str(golden / "checkpoints" / "base-mixtral-h128-i128")
    assert other in error_line(command("verify", MODEL, "--against", other))


def test_verify_fails_where_logits_differ(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def far(*_: object) -> float:
        return 2e-4

    monkeypatch.setattr("quant_moelora.integrations.verify.relative_rms", far)
    run = command("verify", MODEL)
    assert run.code == 1 and run.out.splitlines()[-1].startswith("FAILED: logits differ")
    run = command("verify", MODEL, "--json")
    assert run.code == 1 and run.json["ok"] is False


# --- convert ----------------------------------------------------------------------------------------------------------


def test_convert(command: Command, tmp_path: Path) -> None:
    """What it writes loads, and completes a prompt as the checkpoint does."""
    out = tmp_path / "packed"
    found = command("convert", MODEL, str(out), "--max-shard-size=300KB", "--json").json
    sizes = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    assert found == {"path": str(out), "bytes": sum(sizes.values()), "files": sizes} and len(sizes) > 1
    (layer,) = command("inspect", str(out), "--json").json["experts"]
    assert layer["scheme"] == "w4a16_g32_asym"
    packed, own = (command("generate", f"--model={path}", f"--prompt={PROMPT}", "--json") for path in (out, MODEL))
    assert packed.json["completions"] == own.json["completions"]


def test_convert_as_text_and_refused(command: Command, tmp_path: Path) -> None:
    run = command("convert", MODEL, str(tmp_path / "packed"))
    assert re.fullmatch(r".*/packed: [\d,]+ bytes in 1 files\n", run.out)
    assert "choose another" in error_line(command("convert", MODEL, str(tmp_path / "packed")))
    assert "max_shard_size: got 'many'" in error_line(command("convert", MODEL, str(tmp_path), "--max-shard-size=many"))


# --- generate ---------------------------------------------------------------------------------------------------------


def generate(command: Command, *prompts: str, adapters: list[str] | None = None, more: tuple[str, ...] = ()) -> Run:
    chosen = ADAPTERS if adapters is None else adapters
    options = [f"--prompt={prompt}" for prompt in prompts]
    return command("generate", "--model", MODEL, *chosen, *options, "--max-new-tokens=16", "--dtype=float32", *more)


def test_generate_with_adapters(command: Command) -> None:
    found = generate(command, f"a={PROMPT}", f"b={PROMPT}", PROMPT, f"__base__={PROMPT}", more=("--json",)).json
    assert found.keys() == {"completions", "tokens_per_second", "bytes_resident"}
    assert [(made["adapter"], made["prompt"]) for made in found["completions"]] == [
        ("a", PROMPT),
        ("b", PROMPT),
        ("__base__", PROMPT),
        ("__base__", PROMPT),
    ]
    texts = [made["text"] for made in found["completions"]]
    assert len(set(texts[:3])) == 3, "three ways to go on"
    assert texts[2] == texts[3]
    assert found["tokens_per_second"] > 0
    assert found["bytes_resident"].keys() == {"experts", "expert_adapters", "other"}
    assert all(isinstance(size, int) and size > 0 for size in found["bytes_resident"].values())
    for name, text in zip(("a", "b"), texts, strict=False):
        alone = generate(command, f"{name}={PROMPT}", more=("--json",)).json
        assert alone["completions"][0]["text"] == text, "the batch is what each request is alone"


def test_generate_as_text(command: Command) -> None:
    run = generate(command, f"b={PROMPT}", "t3")
    assert run.code == 0
    first, second, last = run.out.splitlines()
    assert first.startswith(f"[b] {PROMPT} -> t")
    assert second.startswith("[__base__] t3 -> t")
    assert re.fullmatch(r"\d+ tokens/s; bytes resident: experts [\d,]+, expert adapters [\d,]+, other [\d,]+", last)


def test_an_equals_sign_that_names_no_adapter_is_text(command: Command) -> None:
    found = generate(command, "t3=t4", "=t5", "a=t3=t4", "b", more=("--json",)).json
    assert [(made["adapter"], made["prompt"]) for made in found["completions"]] == [
        ("__base__", "t3=t4"),
        ("__base__", "=t5"),
        ("a", "t3=t4"),
        ("__base__", "b"),
    ]


def test_generate_without_adapters(command: Command) -> None:
    found = generate(command, PROMPT, "a=t3", adapters=[], more=("--json", "--dtype=auto", "--device=cpu")).json
    assert [made["adapter"] for made in found["completions"]] == ["__base__"] * 2
    assert found["completions"][1]["prompt"] == "a=t3"
    assert found["bytes_resident"]["expert_adapters"] == 0


@pytest.mark.parametrize("text", ["nonsense", "=folder", "a="])
def test_wrong_adapter_syntax(command: Command, text: str) -> None:
    run = generate(command, PROMPT, adapters=[f"--adapter={text}"])
    assert run.code == 2 and not run.out
    assert len([line for line in run.err.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in run.err
    if text == "nonsense":
        assert "--adapter: got nonsense, expected NAME=FOLDER" in error_line(run)


def test_one_name_for_two_adapters(command: Command) -> None:
    """The first folder would be dropped without a word."""
    run = generate(command, PROMPT, adapters=[ADAPTERS[0], f"--adapter=a={B}"])
    assert run.code == 2 and "error: " in run.err


def test_an_adapter_that_does_not_fit(command: Command, golden: Path) -> None:
    run = generate(command, PROMPT, adapters=[f"--adapter=x={golden / 'adapters' / 'lora-tp-mixtral-r4'}"])
    assert run.code == 2 and not run.out
    assert "experts.gate_up_proj" in run.err and "attach the adapter to the model it was trained on" in run.err


def test_wrong_backend_and_dtype(command: Command) -> None:
    run = generate(command, PROMPT, adapters=[], more=("--backend=merlin",))
    assert run.code == 2 and "error: backend: got 'merlin'" in run.err
    run = generate(command, PROMPT, adapters=[], more=("--dtype=float63",))
    assert run.code == 2 and "float63" in run.err and "Traceback" not in run.err
    run = generate(command, PROMPT, adapters=[], more=("--device=gpu",))
    assert run.code == 2 and "error: device_map: got 'gpu'" in run.err


def test_usage(command: Command) -> None:
    assert command("generate", "--prompt=t3").code == 2
    assert command("generate", "--model", MODEL).code == 2
    assert command("nonsense").code == 2
    assert generate(command, PROMPT, more=("--max-new-tokens=0",)).code == 2


# --- all commands -----------------------------------------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def test_version_and_help(command: Command) -> None:
    assert command("--version").out == f"quant-moelora {quant_moelora.__version__}\n"
    run = command("--help")
    assert run.code == 0 and "Exit codes: 0 " in run.out
    assert COMMANDS.keys() == {
        "inspect",
        "verify",
        "convert",
        "generate",
        "serve",
        "export-adapter",
        "bench",
        "tune",
        "demo",
    }
    for name in COMMANDS:
        (line,) = (line for line in run.out.splitlines() if line.split()[:1] == [name])
        assert line.endswith("."), "said in one line"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(command: Command, name: str) -> None:
    """Each option of an example exists and takes its value; nothing is run."""
    run = command(name, "--help")
    assert run.code == 0
    examples = run.out.partition("Examples:\n")[2].replace("\\\n", " ").splitlines()
    assert examples
    for example in examples:
        program, verb, *arguments = shlex.split(example)
        assert (program, verb) == ("quant-moelora", name)
        COMMANDS[name].make_context(name, arguments)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PermissionError(13, "Permission denied", "model"), "PermissionError: [Errno 13] Permission denied: 'model'"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "OutOfMemoryError: CUDA out of memory. Tried to"),
    ],
)
def test_what_a_machine_refuses_is_one_line(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr("quant_moelora.cli.inspect.describe", fail)
    run = command("inspect", MODEL)
    assert (run.code, run.out, run.err) == (2, "", f"error: {told}\n")


def test_a_bug_is_a_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise KeyError("bug")

    monkeypatch.setattr("quant_moelora.cli.inspect.describe", fail)
    monkeypatch.setattr(sys, "argv", ["quant-moelora", "inspect", MODEL])
    with pytest.raises(KeyError):
        main()


def test_a_device_that_is_not_there(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "sees no CUDA devices" in error_line(generate(command, PROMPT, more=("--device=cuda",)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "--device: got cuda:2" in error_line(generate(command, PROMPT, more=("--device=cuda:2",)))


def test_prompts_without_tokens(command: Command, tmp_path: Path) -> None:
    """transformers makes an empty tokenizer for a checkpoint without tokenizer files."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    for run in (command("generate", f"--model={tmp_path}", f"--prompt={PROMPT}"), generate(command, PROMPT, "")):
        assert run.code == 2 and "Traceback" not in run.err
        assert "tokenizer.json is missing beside the weights" in run.err


# --- export-adapter ---------------------------------------------------------------------------------------------------


def test_export_adapter_there_and_back(command: Command, tmp_path: Path) -> None:
    def run(adapter: Path, to: Path, form: str) -> Run:
        return command("export-adapter", "--model", MODEL, "--adapter", str(adapter), "--to", str(to), "--form", form)

    source, apart, fused = A, tmp_path / "apart", tmp_path / "fused"
    done = run(source, apart, "per-expert")
    assert done.code == 0 and not done.err
    assert done.out == f"{apart}: per-expert, 2 layers of experts, 0 other linear layers\n"
    back = command(
        "export-adapter", f"--model={MODEL}", f"--adapter={apart}", f"--to={fused}", "--form=fused", "--json"
    )
    assert back.json == {"path": str(fused), "form": "fused", "expert_layers": 2, "other_linears": 0}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, fused))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert "choose another folder" in error_line(run(source, fused, "fused"))
    assert run(source, tmp_path / "n", "per_expert").code == 2
    texts = [generate(command, f"x={PROMPT}", adapters=[f"--adapter=x={f}"], more=("--json",)) for f in (source, apart)]
    assert texts[0].json["completions"] == texts[1].json["completions"]


def test_export_adapter_names_what_the_form_cannot_hold(command: Command, golden: Path, tmp_path: Path) -> None:
    model = golden / "checkpoints" / "base-mixtral-h128-i128"
    adapter = golden / "adapters" / "lora-mod-mixtral-rankpattern"
    names = ("--model", str(model), "--adapter", str(adapter), "--to", str(tmp_path / "n"))
    line = error_line(command("export-adapter", *names, "--form=fused"))
    for part in ("gate and up of expert 3", "layers.1", "rank 16", "rank 8", "per_expert"):
        assert part in line


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo(command: Command) -> None:
    run = command("demo")
    assert run.code == 0
    *lines, figures, parity = run.out.splitlines()
    texts = dict(re.findall(r"^\[(\w+)\] When the -> (.+)$", "\n".join(lines), re.M))  # a text may have several lines
    assert list(texts) == ["__base__", "scripture", "novel"]
    assert len(set(texts.values())) == 3, "base and two adapters go three ways"
    assert re.fullmatch(r"\d+ tokens/s; bytes resident: experts [\d,]+, expert adapters [\d,]+, other [\d,]+", figures)
    found = re.fullmatch(r"parity with the dequantised model: .* by (\S+) \(relative RMS, float32\)", parity)
    assert found and float(found[1]) < 1e-5


def test_demo_json(command: Command) -> None:
    found = command("demo", "--json").json
    assert found.keys() == {"completions", "tokens_per_second", "bytes_resident", "parity"}
    assert [made["adapter"] for made in found["completions"]] == ["__base__", "scripture", "novel"]
    assert 0 <= found["parity"] < 1e-5
