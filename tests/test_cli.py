"""The command line: what it prints, and one line and status 2 for what a user gets wrong."""

import inspect
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights.__main__ import _parser, main
from fastweights.tokenizer import Tokenizer

WORDS = ["the", "sky", "is", "blue", "red", "question", ":", "who", "?", "A", "B", "(", ")", "and", "so", "it", "goes"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    backend = Backend(models.WordLevel({word: n + 2 for n, word in enumerate(WORDS)} | {"?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(path / "tokenizer.json"))
    fw.save(tiny(torch.float32), path, Tokenizer.from_folder(path))
    return str(path)


RUN = ["run", "--context", "the sky is red", "--question", "who ?", "--answers", "A,B", "--layers", "1,2"]


def test_run_prints_a_table_a_paragraph_and_one_json_line(folder, capsys, tmp_path):
    options = ["--rule", "local-least-squares", "--target", "slow", "--rate", "0.3", "--mu", "0.1", "--decay", "0.1"]
    assert main([*RUN, "--model", folder, *options, "--out", str(tmp_path / "out"), "--json"]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out.splitlines()[-1])
    assert whole["tokens"] == ["the", "sky", "is", "red"]
    assert whole["layers"] == [1, 2]
    assert whole["answers"] == ["A", "B"]
    assert whole["model"] == folder
    assert len(whole["events"]) == 4
    assert torch.tensor(whole["distance"]).shape == (5, 5)
    assert torch.tensor(whole["logprob"]).shape == (5, 2)
    assert "gamma=0.3, mu=0.1" in whole["settings"]["rule"]
    assert "After 4 events" in " ".join(out.split())
    assert json.loads((tmp_path / "out" / "record.json").read_text())["logprob"] == whole["logprob"]
    files = ["record.json", "arrays.safetensors", "report.html", "logprob.png", "distance.png", "norms.png"]
    assert f"saved to {tmp_path / 'out'}: {', '.join(files)}" in out
    assert all((tmp_path / "out" / name).is_file() for name in files)
    assert folder in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_run_keeps_to_a_budget_and_prints_and_returns_the_drift(folder, capsys):
    options = ["--rate", "0.5", "--budget", "0.05", "--linears", "up_proj", "--json"]
    assert main([*RUN, "--model", folder, *options]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out.splitlines()[-1])
    assert (whole["settings"]["budget"], whole["settings"]["over_budget"]) == (0.05, "scale")
    assert [each["name"] for each in whole["drift"]] == ["layers.1.mlp.up_proj", "layers.2.mlp.up_proj"]
    assert [each["scaled"] for each in whole["drift"]] == [4, 4]
    assert [each["relative"] for each in whole["drift"]] == pytest.approx([0.05, 0.05])
    assert "changed most, by 5.000% of ‖W‖;\nthe capacity has lost nothing." in out
    assert main([*RUN, "--model", folder, *options, "--over-budget", "stop"]) == 2
    assert "event 1 of layers.1.mlp.up_proj (row 0) makes ‖ΔW‖" in capsys.readouterr().err


def test_generate_says_what_changed_when_asked(folder, capsys):
    command = ["generate", "the sky", "--model", folder, "--layers", "1", "--max-new-tokens", "3", "--json"]
    assert main([*command, "--drift", "--rate", "0.5", "--budget", "0.05"]) == 0
    said = capsys.readouterr()
    assert "‖ΔW‖/‖W‖" in said.err
    assert all(each["scaled"] for each in json.loads(said.out.splitlines()[-1])["drift"])
    assert main(command) == 0
    assert "drift" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_run_reads_texts_from_files_and_chooses_positions(folder, capsys, tmp_path):
    (tmp_path / "context.txt").write_text("the sky is red and so it goes")
    arguments = [*RUN, "--model", folder, "--update", "1,3", "--probe-every", "2", "--json"]
    arguments[arguments.index("the sky is red")] = f"@{tmp_path / 'context.txt'}"
    assert main(arguments) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [event["position"] for event in whole["events"]] == [1, 3]
    assert whole["probed"] == [0, 2]


def test_run_takes_the_target_of_a_delta_rule_from_a_file(folder, capsys, tmp_path):
    save_file({"target": torch.linspace(-1, 1, 24)}, tmp_path / "target.safetensors")
    options = ["--rule", "delta", "--rate", "0.5", "--linears", "down_proj", "--json"]
    assert main([*RUN, *options, "--target", str(tmp_path / "target.safetensors"), "--model", folder]) == 0
    model, tokenizer = fw.load(folder)
    record = fw.surgery(
        model,
        tokenizer,
        context="the sky is red",
        question="who ?",
        answers=["A", "B"],
        layers=[1, 2],
        linears=["down_proj"],
        rule=fw.Delta(0.5, torch.linspace(-1, 1, 24)),
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["logprob"] == record.logprob.tolist()


def test_demo_runs_both_halves_of_the_founding_experiment(folder, capsys, tmp_path):
    assert main(["demo", "--model", folder, "--layers", "1,2", "--json", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Donald J. Trump" in out
    halves = list(json.loads(out.splitlines()[-1]).values())
    assert "GradientAscent" in halves[0]["settings"]["rule"]
    assert [event["position"] for event in halves[1]["events"]] == [10, 12, 13]
    for half in ("GradientAscent", "Hebbian"):
        assert (tmp_path / half / "record.json").exists()
        assert (tmp_path / half / "report.html").exists()
        assert f"saved to {tmp_path / half}: record.json" in out


def test_generate_streams_text_and_counts_events(folder, capsys):
    options = ["--model", folder, "--layers", "1", "--max-new-tokens", "5", "--update", "all", "--json"]
    assert main(["generate", "the sky is", *options]) == 0
    captured = capsys.readouterr()
    whole = json.loads(captured.out.splitlines()[-1])
    assert captured.err.splitlines()[0] == "prompt ids: [2, 3, 4]"
    assert whole["events"] == 3 + len(whole["token_ids"])
    model, tokenizer = fw.load(folder)
    fw.attach(model, [1], fw.Hebbian(rate=0.01))
    steps = fw.Episode(model).generate(tokenizer.encode("the sky is"), 5, update="all")
    assert whole["token_ids"] == [int(step.token_ids) for step in steps]


def test_info_shows_the_shape_and_the_ids_of_a_text(folder, capsys):
    assert main(["info", "--model", folder, "--text", "who ?", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["ids"] == [9, 60]
    assert facts["parameters"] == sum(p.numel() for p in tiny().parameters())
    assert facts["num_hidden_layers"] == 4
    episode = fw.Episode(fw.load(folder)[0])
    episode.feed([0])
    assert (facts["path"], facts["why"]) == (episode.path, episode.why)


def test_info_shows_the_anatomy(folder, capsys):
    assert main(["info", "--model", folder, "--json"]) == 0
    out = capsys.readouterr().out
    found = fw.anatomy(folder)
    assert str(found) in out
    assert json.loads(out.splitlines()[-1])["anatomy"] == found.to_dict()


@pytest.mark.parametrize("site", ["resid_post", "resid_mid"])
@pytest.mark.parametrize("norm", [True, False])
def test_lens_prints_and_returns_every_layers_likeliest_tokens(folder, capsys, site, norm):
    command = ["lens", "the sky is", "--model", folder, "--site", site, "--top", "3", "--answer", " blue and", "--json"]
    assert main([*command, *([] if norm else ["--no-norm"])]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out.splitlines()[-1])
    model, tokenizer = fw.load(folder)
    trace = fw.Episode(model).probe(tokenizer.encode("the sky is"), sites=[site])
    hidden = trace.hidden_states if site == "resid_post" else trace[site]
    logits = torch.stack([fw.lens(model, row, norm) for row in hidden[:, 0, -1]]).double()
    assert len(whole["layers"]) == len(whole["rank"]) == (5 if site == "resid_post" else 4)
    for layer, best in enumerate(whole["layers"]):
        order = logits[layer].argsort(descending=True)[:3]
        assert [each["token"] for each in best] == tokenizer.tokens(order)
        assert [each["logit"] for each in best] == pytest.approx(logits[layer, order].tolist(), abs=1e-5)
        assert [each["probability"] for each in best] == pytest.approx(
            logits[layer].softmax(-1)[order].tolist(), abs=1e-6
        )
        assert whole["rank"][layer] == int((logits[layer] > logits[layer, 5]).sum())
    assert whole["first"] == (whole["rank"].index(0) if 0 in whole["rank"] else None)
    assert (whole["site"], whole["norm"], whole["tokens"]) == (site, norm, ["the", "sky", "is"])
    table = out.splitlines()[:-1]
    assert table[0].split() == ["layer", "first", "2.", "3.", "rank", "of", "'blue'"]
    assert [int(line.split()[-1]) for line in table[1 : 1 + len(whole["rank"])]] == whole["rank"]
    assert f"{site} at the last token, {'through' if norm else 'without'} the final norm" in table[-2]
    assert table[-1].startswith("'blue', the first of the answer's 2 tokens, is first choice ")


def test_lens_writes_a_page_that_holds_what_it_printed(folder, capsys, tmp_path):
    command = ["lens", "the <sky> is", "--model", folder, "--answer", " blue", "--out", str(tmp_path / "new"), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    assert "the &lt;sky&gt; is" in page
    assert all(f"{row[0]['probability']:.1%}" in page for row in printed["layers"])


def test_lens_names_the_first_layer_that_says_the_answer(folder, capsys):
    assert main(["lens", "the sky is", "--model", folder, "--top", "1", "--json"]) == 0
    out = capsys.readouterr().out
    whole = json.loads(out.splitlines()[-1])
    assert whole.keys().isdisjoint({"rank", "first"})
    assert len(out.splitlines()) == 1 + 5 + 1 + 1
    model, tokenizer = fw.load(folder)
    last = whole["layers"][-1][0]["token"]
    assert last == tokenizer.tokens(model(torch.tensor([[2, 3, 4]]))[0, -1].argmax())[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*RUN[:-1], "9"], "layer 9 does not exist: this model has layers 0 to 3"),
        ([*RUN[:-1], "one"], "'one': expected whole numbers"),
        ([*RUN, "--linears", "q_proj"], "linear 'q_proj' does not exist"),
        ([*RUN, "--rule", "oja"], "invalid choice: 'oja'"),
        ([*RUN, "--rate", "nan"], "Hebbian(rate=nan): expected a finite number"),
        ([*RUN, "--decay", "2"], "Hebbian(decay=2.0): expected a number from 0 to 1"),
        ([*RUN, "--rule", "gradient-ascent", "--gate", "ones"], "--gate does not belong to --rule gradient-ascent"),
        ([*RUN, "--rule", "delta"], "--rule delta needs --target FILE.safetensors"),
        ([*RUN, "--rule", "delta", "--target", "/no/such"], "No such file or directory: /no/such"),
        ([*RUN, "--rule", "local-least-squares", "--target", "fast"], "LocalLeastSquares(target='fast')"),
        ([*RUN, "--rank", "0"], "rank=0"),
        ([*RUN, "--overflow", "error", "--rank", "2"], "4 events do not fit its rank of 2"),
        ([*RUN, "--dtype", "int4"], "int4"),
        ([*RUN, "--context", ""], "empty context"),
        ([*RUN, "--context", "@/no/such/file"], "cannot read /no/such/file"),
        ([*RUN, "--update", "5"], "writes none of the context's 4 tokens"),
        (["run"], "the following arguments are required"),
        (["rum"], "invalid choice: 'rum'"),
        (["generate", "", "--max-new-tokens", "3"], "at least one token"),
        (["generate", "the", "--chat"], "chat template"),
        (["generate", "the", "--rate", "0.3"], "--rate needs --layers"),
        (["generate", "the", "--drift"], "--drift needs --layers"),
        (["generate", "the", "--top-p", "7"], "generate(top_p=7.0)"),
        (["generate", "the", "--max-new-tokens", "999"], "the KV cache holds 256"),
        (["lens", "the", "--top", "0"], "--top 0: expected 1 to 61"),
        (["lens", ""], "empty text"),
        (["lens", "the", "--site", "middle"], "site 'middle' does not exist"),
        (["lens", "the", "--site", "z"], "--site z: expected a site of the stream's width"),
        (["lens", "the", "--site", "model.layers.1.mlp"], "--site model.layers.1.mlp: expected a site"),
        (["lens", "the", "--out", "README.md"], "--out README.md is a file, expected a folder"),
        (["lens", "the", "--answer", ""], "answers holds an empty text"),
        (["lens", "the " * 300], "a probe of 300 tokens does not fit"),
    ],
)
def test_a_users_mistake_is_one_line_on_stderr_and_status_2(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(
            main([*arguments, *(["--model", folder] if arguments[0] in ("run", "generate", "lens") else [])])
        )
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("prompt ids")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("fastweights")
    assert message in lines[0]
    assert captured.out.strip() == ""


def test_a_model_that_does_not_exist_is_one_line(capsys):
    assert main(["info", "--model", "/no/such/folder"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_full_run_never_imports_transformers(folder):
    code = f"""
import sys
import fastweights as fw
assert "jinja2" not in sys.modules and "rich" not in sys.modules and "matplotlib" not in sys.modules, "heavy import"
from fastweights.__main__ import _parser, main
assert main({RUN!r} + ["--model", {folder!r}]) == 0
assert main(["generate", "the sky", "--layers", "1", "--max-new-tokens", "3", "--model", {folder!r}]) == 0
assert "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def default(call, name):
    value = inspect.signature(call).parameters[name].default
    return list(value) if isinstance(value, tuple) else value


def test_every_flag_has_the_default_of_the_python_call_behind_it():
    shared = {name: fw.load for name in ("dtype", "device", "strict")} | {"model": fw.load}
    plastic = dict.fromkeys(("linears", "rank", "overflow", "budget", "over_budget"))
    own = {"command", "json", "out", "layers", "chat", "drift"}
    rules = {"rule", "rate", "mu", "decay", "clip", "gate", "target", "bias"}
    run = dict.fromkeys([*plastic, "update", "max_new_tokens", "probe_every"], fw.surgery)
    generate = dict.fromkeys(plastic, fw.attach)
    sampling = (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "update",
        "max_new_tokens",
    )
    generate |= dict.fromkeys(sampling, fw.Episode.generate)
    for command, calls, given in (
        (["generate", "x"], generate, {"prompt"}),
        ([*RUN], run, {"context", "question", "answers"}),
        (["demo"], {}, set()),
        (["info"], {}, {"text"}),
    ):
        options, calls = vars(_parser().parse_args(command)), {**shared, **calls}
        names = {"model": "name", "stop": "stop_strings"}
        for flag in options.keys() - own - rules - given:
            assert options[flag] == default(calls[flag], names.get(flag, flag)), f"{command[0]} --{flag}"
    rule = {flag: options for flag, options in vars(_parser().parse_args(RUN)).items() if flag in rules}
    assert rule == {**dict.fromkeys(rules), "rule": "hebbian", "rate": 0.01}  # None: as the rule has it


def test_the_same_run_gives_the_same_numbers_in_python(folder, capsys):
    command = ["generate", "the sky is", "--model", folder, "--layers", "1", "--rank", "4", "--rate", "0.1", "--json"]
    assert main(command) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    model, tokenizer = fw.load(folder)
    fw.attach(model, [1], fw.Hebbian(rate=0.1), rank=4)
    episode = fw.Episode(model)
    steps = list(episode.generate(tokenizer.encode("the sky is"), tokenizer=tokenizer))
    assert whole["token_ids"] == [int(step.token_ids) for step in steps]
    assert whole["text"] == "".join(step.text[0] for step in steps)
    assert whole["finish_reason"] == steps[-1].finish_reason[0]
    assert whole["events"] == episode.events == len(steps)


@pytest.mark.parametrize("content", [b"the sky is", b"the sky is\n", b"\xef\xbb\xbfthe sky is\r\n"])
def test_a_text_from_a_file_is_without_the_editors_last_newline_and_byte_order_mark(content, tmp_path):
    (tmp_path / "text").write_bytes(content)
    assert _parser().parse_args(["generate", f"@{tmp_path / 'text'}"]).prompt == "the sky is"
    (tmp_path / "text").write_bytes(b"one\n\n\n")
    assert _parser().parse_args(["generate", f"@{tmp_path / 'text'}"]).prompt == "one\n\n"


def test_layers_may_be_all_or_count_from_the_last(folder, capsys):
    arguments = [*RUN[:-2], "--model", folder, "--json"]
    for given, layers in (("all", [0, 1, 2, 3]), ("-1", [3]), ("0,-2", [0, 2])):
        assert main([*arguments, f"--layers={given}"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["layers"] == layers
    assert main([*arguments, "--layers=-5"]) == 2
    assert "layer -5 does not exist: this model has layers 0 to 3" in capsys.readouterr().err


def test_generate_goes_on_until_the_context_is_full(folder, capsys):
    prompt = " ".join(["sky"] * 250)
    assert main(["generate", prompt, "--model", folder, "--json"]) == 0
    said = capsys.readouterr()
    assert "6 tokens, 0 events, finish_reason: length" in said.err
    assert json.loads(said.out.splitlines()[-1])["finish_reason"] == "length"


def fastweights(*arguments, **options):
    command = [sys.executable, "-m", "fastweights", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_version_help_and_a_closed_pipe_end_quietly(folder):
    with fastweights("--version") as process:
        out, err = process.communicate()
        assert (process.returncode, err) == (0, b"")
        assert out.startswith(b"fastweights")
    with fastweights("info", "--model", folder) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_terminal_without_the_letters_gets_escapes(folder):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = [
        "generate",
        "the sky",
        "--model",
        folder,
        "--layers",
        "1",
        "--max-new-tokens",
        "3",
        "--drift",
        "--json",
    ]
    with fastweights(*arguments, env=environment) as process:
        out, err = process.communicate()
    assert process.returncode == 0
    assert b"\\u2016\\u0394W\\u2016" in err  # ‖ΔW‖
    assert json.loads(out.splitlines()[-1])["events"] == 3


def test_ctrl_c_is_one_line_and_status_130(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(fw.Episode, "generate", interrupted)
    assert main(["generate", "the sky", "--model", folder]) == 130
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "fastweights: interrupted\n")
