"""Where the compiled helper may come from, and what works without a home, a compiler, asserts or leave to write."""

import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastweights import files, hub
from fastweights.kernels import cpu
from fastweights.kernels.linear import linear

ROOT = Path(__file__).parent.parent
ALONE = "the C helper was compiled for this process alone, and will be again for the next: "


@pytest.fixture
def helper(monkeypatch, tmp_path):
    """A cache folder to come, and a helper that is compiled quickly."""
    monkeypatch.setenv("FASTWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "FLAGS", ("-O0", *cpu.FLAGS[1:]))
    cpu.library.cache_clear()
    yield tmp_path / "cache"
    cpu.library.cache_clear()


def loaded_from():
    """The libraries of ours that this process has mapped, by their paths."""
    return set(re.findall(r"\S*/cpu-[0-9a-f]{16}\.so", Path("/proc/self/maps").read_text()))


@contextlib.contextmanager
def compiled_alone(folder, reason):
    """Inside, the helper works, is not taken from `folder`, leaves nothing behind, and one warning says why."""
    before = loaded_from()
    W, h = torch.randn(300, 300), torch.randn(1, 300)
    with pytest.warns(UserWarning, match=re.escape(ALONE) + reason) as caught:
        y = linear(h, W, None)
    torch.testing.assert_close(y, h @ W.T, rtol=0, atol=1e-4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert cpu.library() is not None
    new = loaded_from() - before
    assert not any(path.startswith(str(folder)) for path in new)
    assert not any(Path(path).exists() for path in new)
    yield


def test_the_helper_is_kept_in_a_folder_that_only_its_user_can_write(helper):
    old = os.umask(0)  # whatever the umask says
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cpu.library() is not None
    finally:
        os.umask(old)
    (built,) = helper.iterdir()
    assert helper.stat().st_mode & 0o022 == built.stat().st_mode & 0o022 == 0
    assert str(built) in loaded_from()
    written = built.stat().st_mtime_ns
    cpu.library.cache_clear()
    assert cpu.library() is not None
    assert built.stat().st_mtime_ns == written  # not compiled again


def planted(helper):
    """Somebody's library under the name that is looked for: not one at all, so loading it would be an error."""
    helper.mkdir(exist_ok=True)
    path = helper / cpu._name("cc")
    path.write_bytes(b"not a library")
    return path


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_folder_that_others_can_write_is_not_loaded_from(helper, mode):
    path = planted(helper)
    helper.chmod(mode)
    with compiled_alone(helper, rf"{helper} can be written by others \(chmod go-w {helper}\)"):
        assert path.read_bytes() == b"not a library"


def test_a_library_that_others_can_write_is_not_loaded(helper):
    path = planted(helper)
    path.chmod(0o666)
    with compiled_alone(helper, f"{path} can be written by others"):
        assert path.read_bytes() == b"not a library"


@pytest.mark.parametrize("whose", ["folder", "library"])
def test_what_belongs_to_another_user_is_not_loaded(helper, monkeypatch, whose):
    path = planted(helper)
    foreign = helper if whose == "folder" else path
    stat = Path.stat

    def of_another(self, **arguments):
        status = list(stat(self, **arguments))
        if self == foreign:
            status[4] = os.geteuid() + 1
        return os.stat_result(status)

    monkeypatch.setattr(Path, "stat", of_another)
    with compiled_alone(helper, f"{foreign} belongs to another user"):
        assert path.read_bytes() == b"not a library"


def test_a_link_to_nowhere_or_a_library_of_another_machine_is_passed_over(helper):
    path = planted(helper)
    with compiled_alone(helper, r".*(invalid ELF header|file too short)"):
        pass
    cpu.library.cache_clear()
    path.unlink()
    path.symlink_to("nowhere")
    with compiled_alone(helper, r".*No such file"):
        pass


def test_a_cache_folder_that_cannot_be_written_costs_a_compilation_and_says_so(helper):
    helper.write_text("a file where the folder should be")
    with compiled_alone(helper, r".*File exists"):
        pass


def test_without_a_home_the_helper_is_compiled_for_the_process_and_the_default_model_says_what_to_set(
    helper, monkeypatch, tmp_path
):
    for name in ("FASTWEIGHTS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a user whom the password file does not know
    assert files.cache_folder() is None
    with compiled_alone(helper, "HOME and FASTWEIGHTS_CACHE are not set"):
        pass
    monkeypatch.setattr(hub, "_hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(OSError, match=r"HOME is not set: set FASTWEIGHTS_CACHE to one, or pass a folder"):
        hub.default_folder(lambda source, folder: None)
    with pytest.raises(OSError, match=r"no home folder to keep org/name in: set HF_HOME to a folder"):
        hub.download("org/name", None)
    monkeypatch.setenv("HOME", "")
    assert files.cache_folder() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / "fastweights"
    monkeypatch.setenv("HOME", str(tmp_path))
    for root, folder in (("~/mine", tmp_path / "mine"), ("", tmp_path / "fastweights")):
        monkeypatch.setenv("FASTWEIGHTS_CACHE", root)
        assert files.cache_folder() == folder


def told():
    """What a plastic life of a small model generates; the weights and the ids are always the same."""
    from tiny import prompt, tiny

    import fastweights as fw

    model = tiny(torch.float32)
    fw.attach(model, layers=[1, 2], rule=fw.Hebbian(rate=0.05), rank=32, overflow="grow")
    steps = fw.Episode(model).generate(prompt(1, 12), 8, update="all", stop_token_ids=())
    return [int(step.token_ids[0]) for step in steps]


def test_python_without_asserts_and_without_a_compiler_generates_the_same():
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-O", "-c", "from test_files import told; print(told())"],
        env={**os.environ, "PYTHONPATH": path, "FASTWEIGHTS_CC": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{told()}\n", done.stderr


def work(queue):
    torch.set_num_threads(1)  # as torch's own workers do: OpenMP's threads did not come along
    queue.put(told())


def test_a_forked_worker_generates_what_its_parent_has_generated():
    expected, context = told(), multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=work, args=(queue,))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0, "the child hangs or has failed"
    assert queue.get() == expected


def test_texts_appear_whole_and_broken_json_is_named(tmp_path):
    path = tmp_path / "a.json"
    assert files.read_json(path) == {}
    files.write_text(path, '{"ä": 1}')
    assert files.read_json(path) == {"ä": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    for text, message in (("{", "is not valid JSON"), ("[]", "holds a list, expected an object of settings")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"a\.json {message}"):
            files.read_json(path)
    assert files.one_line(ValueError("two\n lines")) == "two lines"
    assert files.one_line(KeyError()) == "KeyError"
