"""The command line: exit codes, JSON that other tools rely on, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import vit
from PIL import Image
from rounding import MODEL
from vit.cli import COMMANDS, main
from vit.data import open_source
from vit.support.files import to_json
from vit.training.config import FIELDS, RECIPES, flag
from vit.training.progress import Bar, Lines, display
from vit.training.run import Run
from vit.viz import curves

TINY = [
    "--arch",
    "embed_dim=16",
    "depth=1",
    "num_heads=2",
    "--epochs",
    "1",
    "--batch-size",
    "256",
    "--warmup-epochs",
    "0",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *TINY, "--out", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    open_source("digits").splits["train"].image(3).save(path)
    return path


def vit_process(*words: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vit", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


# ---- the command as a whole ----


def test_every_command_has_help_with_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert f"usage: vit {command}" in capsys.readouterr().out
    main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, option in FIELDS.items():
        assert flag(name) in text
        part = text[text.rindex(flag(name) + " ") :]
        shown = re.search(r"\(default: ([^()]*)\)", part)
        assert shown, name
        if option.default is None and any(name in recipe for recipe in RECIPES.values()):
            assert all(f"{recipe[name]} for {kind}" in shown[1] for kind, recipe in RECIPES.items())
        elif name != "arch":
            assert shown[1] == ("none" if option.default is None else str(option.default))


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for words, code in (([], 2), (["--help"], 0)):
        assert main(words) == code
        captured = capsys.readouterr()
        text = captured.out if code == 0 else captured.err
        assert [line.split()[0] for line in text.splitlines()[2:]] == list(COMMANDS)


def test_an_unknown_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["qqq"]) == 2
    assert "there is no command 'qqq'. Commands: info" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert capsys.readouterr().err.startswith("vit: there is no command 'trian'; did you mean vit train?")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vit {vit.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--no-such-option"],
        ["train", "--epochs", "many"],
        ["train", "--augment", "mirror"],
        ["eval"],
        ["predict", "run"],
        ["eval", "run", "--split", "none"],
        ["eval", "run", "--batch-size", "0"],
        ["eval", "run", "--workers", "-1"],
        ["predict", "run", "image.png", "--top", "0"],
        ["info", "vit_digits", "--batch", "many"],
        ["quantize", "run", "--calibrate", "digits", "--output", "no/such/folder/engine.vit"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_exit_code_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert f"usage: vit {words[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["train", "--data", "nowhere"],
            "vit: data 'nowhere' does not exist; allowed: digits, a folder of class folders",
        ),
        (["train", "--model", "vit_bas"], "vit: unknown model 'vit_bas'; nearest: "),
        (["train", "--backend", "gpu"], "vit: unknown backend 'gpu'; known are auto"),
        (["train", "--arch", "depth"], "vit: --arch takes KEY=VALUE, for example embed_dim=128; got 'depth'"),
        (["train", "--arch", "dept=3"], "vit: create has no argument 'dept'; did you mean depth"),
        (["train", "--arch", "embed_dim=10", "num_heads=3"], "vit: embed_dim 10 is not a multiple of num_heads 3"),
        (["train", "--arch", "img_size=9"], "vit: the image size 9 x 9 is no multiple of the patch size 2 x 2"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--resume", "nowhere"], "vit: nowhere is not a run folder: no such folder"),
        (["train", "--weights", "nowhere.safetensors"], "nowhere.safetensors"),
        (["eval", "nowhere"], "vit: nowhere is not a run folder: no such folder"),
        (["predict", "nowhere", "image.png"], "nowhere"),
        (["info", "vit_bas"], "vit: unknown model 'vit_bas'; nearest: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_failures_are_one_clear_text(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert text in captured.err
    assert captured.err.startswith("vit: ")
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_only_the_asked_command_is_imported() -> None:
    code = (
        "import sys; from vit.cli import main; main(['info', '--json']); "
        "print(sorted(m for m in sys.modules if m.startswith('vit.cli.') or m in ('accelerate', 'matplotlib', "
        "'sklearn', 'rich')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "['vit.cli.arguments', 'vit.cli.info', 'vit.cli.show']"


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert main(["train", *TINY]) == 1
    assert "vit: this needs accelerate, which is not installed; run: pip install 'vit-kernels[train]'" in (
        capsys.readouterr().err
    )


def test_a_closed_pipe_is_quiet() -> None:
    process = vit_process("info", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 1
    assert error == ""


# ---- info ----


def test_info_says_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name, record in vit.backends().items():
        assert re.search(rf"^{name} ", text, re.MULTILINE)
        if not record["available"]:
            assert str(record["reason"]) in text
    assert torch.__version__ in text


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["backends"].keys() == vit.backends().keys()
    assert record["backends"]["reference"]["available"] is True
    assert record["environment"]["torch"] == torch.__version__


def test_info_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "vit_base_patch16_224", "--batch", "8", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)
    assert size["parameters"] == 86_567_656
    # Patches, per block q, k, v + attention + projection + MLP, head: 197 tokens of 768 channels, 12 heads.
    tokens, dim = 197, 768
    block = 3 * tokens * dim**2 + 2 * tokens**2 * dim + tokens * dim**2 + 8 * tokens * dim**2
    assert size["macs"] == 196 * dim**2 + 12 * block + dim * 1000
    for key in ("parameters", "macs"):
        assert sum(layers[key] for layers in size["layers"]) == size[key]
    assert size["weights"] == 4 * size["parameters"]
    # At least the block's inputs and outputs of every matrix product wait for the backward.
    assert size["activations"] > 8 * 12 * tokens * dim * 4 * 8
    assert 3 * size["weights"] + size["activations"] < size["training"] < 5 * size["weights"] + size["activations"]
    assert size["inference"] < size["activations"] / 4
    assert main(["info", "vit_base_patch16_224"]) == 0
    text = capsys.readouterr().out
    assert "86,567,656 parameters, 17.564 G multiply-adds per image" in text
    assert re.search(r"^MLP +12 +56,669,184 +11\.155$", text, re.MULTILINE)


def test_memory_grows_with_the_batch_and_not_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for batch in ("1", "9"):
        assert main(["info", "vit_digits", "--batch", batch, "--json"]) == 0
        sizes.append(json.loads(capsys.readouterr().out))
    assert sizes[0]["weights"] == sizes[1]["weights"]
    assert sizes[1]["activations"] - 4 == 9 * (sizes[0]["activations"] - 4)  # one number is of the whole batch


def test_info_tells_where_weights_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "vit_small_patch14_reg4_dinov2.lvd142m", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == sum(layers["parameters"] for layers in found["layers"]) == 22_057_344
    assert found["macs"] == sum(layers["macs"] for layers in found["layers"])
    assert found["hub"] == "timm/vit_small_patch14_reg4_dinov2.lvd142m"
    assert (found["license"], found["paper"]) == ("apache-2.0", "https://arxiv.org/abs/2309.16588")
    assert (found["num_classes"], found["input_size"]) == (0, [3, 518, 518])
    assert found["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    assert found["arch"]["reg_tokens"] == 4


def test_info_lists_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "*patch32_224"]) == 0
    assert capsys.readouterr().out.split() == vit.list_models("*patch32_224")
    assert main(["info", "resnet*"]) == 1
    assert "vit: no model is called 'resnet*'" in capsys.readouterr().err


# ---- train and eval ----


def test_train_and_eval_agree_to_the_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *TINY, "--out", str(run), "--json"]) == 0
    captured = capsys.readouterr()
    trained = json.loads(captured.out.splitlines()[-1])
    assert list(trained) == ["run", "test_accuracy", "epochs", "seconds", "backend"]
    assert trained["run"] == str(run)
    assert trained["epochs"] == 1
    assert trained["seconds"] > 0
    assert trained["backend"] in ("cpu", "cuda", "mojo", "sycl", "reference")
    assert captured.out.count("\n") == 1, "with --json the progress goes to standard error"
    assert re.search(r"epoch +1/1  train loss \d\.\d{4}  val loss", captured.err)
    assert main(["eval", str(run), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    final = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    wanted = {"accuracy": final["test_accuracy"], "loss": final["test_loss"], "images": final["test_images"]}
    assert evaluated == evaluated | wanted | {"classes": 10}
    assert evaluated["accuracy"] == trained["test_accuracy"]


def test_eval_in_words_and_of_other_splits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run), "--split", "val"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "10 classes, the val images of digits"
    assert re.match(r"accuracy \d+\.\d\d %  loss \d\.\d{4}  179 images", lines[1])


def strict(text: str) -> object:
    """The value of JSON by the letter of its definition."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_figure_that_is_no_number_is_null_in_json(run, capsys, caplog, monkeypatch):
    evaluation = dataclasses.replace(Run.open(run).evaluate(), loss=math.nan)
    module = importlib.import_module("vit.training.evaluate")  # the package has a function of that name
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: evaluation)
    assert main(["eval", str(run), "--json"]) == 0
    found = strict(capsys.readouterr().out)
    assert found == found | {"accuracy": evaluation.accuracy, "loss": None, "images": evaluation.images, "classes": 10}
    assert "no finite number: loss (nan)" in caplog.text


def test_json_names_what_it_cannot_hold(caplog):
    value = {"a": [1.0, {"b": -math.inf}], "c": (math.nan, "NaN"), "d": 2, "e": None}
    assert strict(to_json(value)) == {"a": [1.0, {"b": None}], "c": [None, "NaN"], "d": 2, "e": None}
    assert "a[1].b (-inf), c[0] (nan)" in caplog.text
    caplog.clear()
    assert to_json([0.1, "x"]) == '[0.1, "x"]'
    assert not caplog.text


def test_metrics_of_a_diverged_epoch_are_json_and_can_be_drawn(run, tmp_path):
    lines = Run.open(run).read_metrics()
    diverged = Run(tmp_path, Run.open(run).config, {})
    end = diverged.log(lines[0] | {"val_loss": math.nan, "grad_norm": math.inf}, 0)
    diverged.log(lines[-1] | {"test_loss": math.nan}, end)
    text = diverged.metrics.read_text()
    assert [strict(line) for line in text.splitlines()] == diverged.read_metrics()
    assert diverged.read_metrics()[0]["val_loss"] is None
    curves(diverged.read_metrics(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size


def test_flags_override_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("epochs: 50\nbatch-size: 256\nlr: 1e-3\narch: {embed_dim: 16, depth: 3, num_heads: 2}\n")
    out = tmp_path / "run"
    assert main(["train", "--config", str(recipe), "--epochs", "1", "--arch", "depth=1", "--out", str(out)]) == 0
    text = (out / "config.yaml").read_text()
    for line in ("epochs: 1", "batch_size: 256", "lr: 0.001", "  embed_dim: 16", "  depth: 1", "ema: 0.995"):
        assert line in text.splitlines()
    # What a run has written is itself a recipe.
    assert main(["train", "--config", str(out / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == (out / "best.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch: 3", "unknown option 'epoch'"),
        ("- 3", "must hold lines of 'option: value', not a list"),
        ("a: [", "is not valid YAML"),
        ("lr: fast", "lr in .* is 'fast'; it must be a float"),
    ],
)
def test_bad_recipes_are_named(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert main(["train", "--config", str(recipe)]) == 1
    error = capsys.readouterr().err
    assert re.search(expected, error)
    assert str(recipe) in error


def test_resume_takes_no_other_options(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(run), "--lr", "1", "--arch", "depth=2"]) == 2
    assert "leave out --arch, --lr" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--out", "elsewhere"]) == 2
    assert "leave out --out" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(run)


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "0")])
def test_a_signal_ends_with_the_command_that_goes_on(tmp_path: Path, number: signal.Signals, workers: str) -> None:
    """As Ctrl-C in a terminal does, the signal goes to the whole process group, workers included."""
    out = tmp_path / "run"
    words = ["--out", str(out), "--epochs", "1000", "--arch", "depth=1", "--workers", workers]
    process = vit_process("train", *words, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.fullmatch(rf"vit: stopped after .*; go on with: vit train --resume {re.escape(str(out))}\n", error)
    assert (out / "checkpoint.safetensors").is_file()
    assert not re.search(r"\x1b|\r", output), "plain lines in a pipe"


# ---- predict ----


def test_predict(run: Path, digit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(digit), str(digit), "--top", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["failed"] == []
    first, second = record["predictions"]
    assert first == second
    assert first["image"] == str(digit)
    assert [entry["class"] for entry in first["top"]] == [str(entry["index"]) for entry in first["top"]]
    probabilities = [entry["probability"] for entry in first["top"]]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)
    model = vit.create(weights=run, training=False)
    with Image.open(digit) as image, torch.inference_mode():
        expected = model(model.preprocess(image)[None]).double().softmax(dim=1)[0]
    # PyTorch's matrix product, under the reference, rounds a batch of one differently.
    rel = 0 if set(model.plan.values()) == {"cpu"} else MODEL * 2**-23
    assert probabilities == pytest.approx(expected.topk(3).values.tolist(), rel=rel)
    assert main(["predict", str(run), str(digit), "--top", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(digit)
    assert len(lines) == 11, "no more classes than there are"


def test_predict_names_broken_images_and_answers_the_others(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, missing, cut = tmp_path / "text.png", tmp_path / "missing.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(digit.read_bytes()[:40])
    words = [str(path) for path in (text, digit, missing, cut)]
    assert main(["predict", str(run), *words, "--json", "--batch-size", "1"]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert [entry["image"] for entry in record["predictions"]] == [str(digit)]
    assert [entry["image"] for entry in record["failed"]] == [str(text), str(missing), str(cut)]
    assert f"cannot read image {text}: not an image" in captured.err
    assert f"cannot read image {missing}: no such file" in captured.err
    assert "vit: 3 of 4 images could not be read" in captured.err


def test_predict_with_plain_weights_needs_their_model(
    run: Path, digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    weights = tmp_path / "weights.safetensors"
    save_file(vit.create("vit_digits", training=False).state_dict(), weights)
    assert main(["predict", str(weights), str(digit), "--model", "vit_digits", "--json"]) == 0
    top = json.loads(capsys.readouterr().out)["predictions"][0]["top"]
    assert {entry["class"] for entry in top} <= set("0123456789")
    assert main(["predict", str(weights), str(digit), "--model", "vit_digit"]) == 1
    assert "nearest: vit_digits" in capsys.readouterr().err


def test_predict_takes_the_class_names_of_any_weights_that_have_them(
    digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    save_file(vit.create("vit_digits", training=False).state_dict(), tmp_path / "model.safetensors")
    labels = [f"digit {i}" for i in range(10)]
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_digits", "label_names": labels}))
    for name in ([], ["--model", "vit_digits"]):
        assert main(["predict", str(tmp_path), str(digit), "--json", *name]) == 0
        top = json.loads(capsys.readouterr().out)["predictions"][0]["top"]
        assert all(entry["class"] == labels[entry["index"]] for entry in top)


def test_predict_needs_classes(digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    weights = tmp_path / "w.safetensors"
    model = vit.create("vit_small_patch8_224", training=False, depth=1)
    save_file(model.state_dict(), weights)
    (tmp_path / "model.json").write_text(json.dumps({"name": "vit_small_patch8_224", "arch": {"depth": 1}}))
    weights.rename(tmp_path / "best.safetensors")
    assert main(["predict", str(tmp_path), str(digit)]) == 1
    assert "has no classifier head" in capsys.readouterr().err


def test_weights_that_would_execute_code_are_refused(
    digit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"head.weight": Payload()}, tmp_path / "evil.pt")
    assert main(["predict", str(tmp_path / "evil.pt"), str(digit), "--model", "vit_digits"]) == 1
    assert "evil.pt" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()


# ---- what a person sees ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_lines_in_a_pipe_or_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(display(io.StringIO()), Lines)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich", None)
        assert isinstance(display(Terminal()), Lines)
    stream = Terminal()
    show = display(stream)
    assert isinstance(show, Bar)
    show.line("before [red]")
    show.start(1, 5, images=64)
    show.epoch({"epoch": 1, "val_accuracy": 0.5}, 2)
    for _ in range(3):
        show.step("loss 1.0000  accuracy 62.5 %  lr 1.00e-03")
    show.stop()
    text = stream.getvalue()
    assert "before [red]" in text
    assert re.search(r"epoch 1/2  val 50\.00 %  loss 1\.0000  accuracy 62\.5 %  [\d,]+ MiB", text), (
        "80 columns are enough"
    )
    assert "images/s" in text
