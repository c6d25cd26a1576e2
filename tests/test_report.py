"""The report: its numbers are the record's, its texts are escaped, and it needs nothing from elsewhere."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

import fastweights as fw
from fastweights import report
from fastweights.report import canvas
from fastweights.tokenizer import Tokenizer

EVIL = "<script>alert('1')</script>"
WORDS = ["the", "sky", "is", "blue", "red", "who", "A", "B&amp;B", "$x^$", EVIL, '"><img/src=//a.b/c>', "<!--", "goes"]
CONTEXT = f'the sky is red {EVIL} <!-- $x^$ "><img/src=//a.b/c> goes'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    backend = Backend(models.WordLevel({word: n + 2 for n, word in enumerate(WORDS)} | {"?": 60}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


def surgery(tokenizer, **changes):
    texts = {"context": CONTEXT, "question": f"who {EVIL} ?", "answers": [EVIL, "B&amp;B blue"]}
    settings = {"layers": [1, 2], "rule": fw.Hebbian(rate=0.2), **texts, **changes}
    return fw.surgery(tiny(), tokenizer, **settings)


@pytest.fixture(scope="module")
def record(tokenizer):
    return surgery(tokenizer)


@pytest.fixture(scope="module")
def page(record):
    return report.record_page(record)


class Reader(HTMLParser):
    """Every element with its attributes, every table's cells as text, and all text outside of style."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self.open = [], {}, "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)
        label = dict(attributes).get("aria-label") or ""
        if label.startswith("table, may scroll: "):
            self.rows = self.tables.setdefault(label.split(": ", 1)[1], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:  # elements without an end
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def numbers(cells):
    return [float(cell.replace("−", "-")) for cell in cells]


def chance(token, logprob):
    return f"{token.replace(' ', '␣')} {100 * math.exp(logprob):.1f}%"


def test_the_page_needs_nothing_from_elsewhere(page):
    for tag, attributes in Reader(page).elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "xlink:href", "data", "poster", "action"):
                assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])
    outside = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=\s]+", "", page)
    assert not re.search(r"https?:|@import|url\((?!#)", outside)


def test_texts_of_the_user_are_shown_and_never_run(record, page):
    reader = Reader(page)
    assert not any(tag in ("script", "img") for tag, _ in reader.elements)
    assert CONTEXT in reader.text
    assert record.settings["question"] in reader.text
    assert f"log p({EVIL})" in reader.text
    assert "B&amp;B blue" in reader.text
    assert html.escape(EVIL) in page
    picture = re.search(r"<svg.*?</svg>", page, re.DOTALL)[0]
    assert "$x^$" in Reader(picture).text  # no formula


def test_the_pages_numbers_are_the_records(record, page):
    tables = Reader(page).tables
    for n, row in enumerate(tables["log-probabilities of the answers"][1:]):
        values = [record.logprob[0, n], record.logprob[-1, n], record.target_logprob[n]]
        assert numbers(row[1:]) == pytest.approx([float(v) for v in values], abs=5e-4)
    events = tables["every probed event"][1:]
    assert len(events) == len(record.probed) == 10
    for row, cells in enumerate(events):
        assert numbers(cells[3:5]) == pytest.approx(record.logprob[row].tolist(), abs=5e-4)
        state = [float(record.distance[row, -1]), float(record.cosine[row, -1]), float(record.delta_norm[row])]
        assert numbers(cells[-3:]) == pytest.approx(state, abs=5e-3)
    assert [cells[2] for cells in events[1:]] == [event.token for event in record.events]
    certificates = tables["drift and certificates"][1:]
    assert [row[0] for row in certificates] == [each.name for each in record.drift.rows]
    assert numbers(row[1] for row in certificates) == pytest.approx([e.norm for e in record.drift.rows], rel=1e-3)
    choices = tables["likeliest next tokens"][1:]
    for n, top in enumerate((record.top[0], record.top[-1], record.target_top), 1):
        assert [row[n] for row in choices] == [chance(*each) for each in top]
    settings = dict(tables["settings"])
    assert settings["rule"] == repr(fw.Hebbian(rate=0.2))
    assert settings["layers"] == "1, 2"
    assert (settings["fastweights"], settings["torch"]) == (fw.__version__, torch.__version__)


def test_the_lens_is_what_the_final_norm_and_the_unembedding_give(record, tokenizer, page):
    model, ids = tiny(), tokenizer.encode(CONTEXT) + tokenizer.encode(record.settings["question"])
    for column, read in ((0, record.question_ids), (2, ids)):
        hidden_LD = fw.Episode(model).probe(read, sites=["resid_post"]).hidden_states[:, 0, -1]
        scale_L1 = (hidden_LD.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        logits_LV = hidden_LD / scale_L1 * model.model.norm.weight @ model.lm_head.weight.T
        best = logits_LV.log_softmax(-1).topk(5)
        assert [[token for token, _ in top] for top in record.lens[column]] == [
            tokenizer.tokens(row) for row in best.indices.tolist()
        ]
        values = torch.tensor([[value for _, value in top] for top in record.lens[column]])
        torch.testing.assert_close(values.double(), best.values, rtol=1e-5, atol=1e-5)
    for top, expected in zip(record.lens, (record.top[0], record.top[-1], record.target_top), strict=True):
        assert [token for token, _ in top[-1]] == [token for token, _ in expected]
        assert [value for _, value in top[-1]] == pytest.approx([value for _, value in expected])
    rows = Reader(page).tables["logit lens"][1:]
    assert len(rows) == 5
    assert rows[3][2].startswith(chance(*record.lens[1][3][0]))


def test_the_same_record_gives_the_same_bytes_also_from_its_json_and_whatever_the_users_style(record, tmp_path):
    names = record.save(tmp_path / "one")
    assert names == ["record.json", "arrays.safetensors", "report.html", "logprob.png", "distance.png", "norms.png"]
    (tmp_path / "two").mkdir()
    whole = json.loads((tmp_path / "one" / "record.json").read_text(encoding="utf-8"))
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.facecolor": "red"}):
        assert report.write(whole, tmp_path / "two") == names[2:]
        assert matplotlib.rcParams["font.size"] == 30
    for name in names[2:]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)


def test_without_matplotlib_the_record_is_saved_and_a_warning_names_the_extra(record, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(
        UserWarning, match=r"holds record.json and arrays.safetensors, and no report of them: .*\[report\]"
    ):
        assert record.save(tmp_path) == ["record.json", "arrays.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.safetensors", "record.json"]
    with pytest.raises(ImportError, match=r'pip install "fastweights\[report\]"'):
        fw.heat_map([[1.0]], y="layer", x="head")


@pytest.mark.parametrize(
    "changes",
    [
        {"probe_every": 50},
        {"update": [3], "answers": ["A"]},
        {"rule": fw.GradientAscent(rate=0.1), "context": "red"},
        {"overflow": "evict", "rank": 2},
        {"answers": ["A", "B&amp;B red goes the sky is blue who", "goes"], "layers": "all", "max_new_tokens": 3},
    ],
)
def test_small_and_odd_records_have_a_report_too(tokenizer, changes, tmp_path):
    names = surgery(tokenizer, **changes).save(tmp_path)
    assert all((tmp_path / name).stat().st_size > 500 for name in names)


def test_answers_on_one_scale_share_a_panel_and_others_have_one_each(record):
    whole = record.to_dict()
    figure, _ = report.draw(whole)["logprob"]
    assert len(figure.axes) == 1
    far = {"logprob": [[row[0], row[1] - 500] for row in whole["logprob"]]}
    far["target_logprob"] = [whole["target_logprob"][0], whole["target_logprob"][1] - 500]
    figure, _ = report.draw({**whole, **far})["logprob"]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert figure.axes[1].lines[0].get_ydata().tolist() == [row[1] for row in far["logprob"]]


def test_pictures_draw_the_records_numbers(record):
    drawn = report.draw(record)
    above, below = (axes.images[0].get_array() for axes in drawn["distance"][0].axes[:2])
    torch.testing.assert_close(torch.tensor(above.data), record.relative.T)
    change = 100 * (record.distance[:, -1] / record.distance[0, -1] - 1)
    torch.testing.assert_close(torch.tensor(below.data[-1]), change)
    line, sizes = drawn["norms"][0].axes[0].lines[0], drawn["norms"][0].axes[1].images[0].get_array()
    assert line.get_ydata().tolist() == record.delta_norm.tolist()
    assert sizes.data.tolist() == [each.event_norms for each in record.drift.rows]


@pytest.mark.parametrize("events", [1, 30, 200])
def test_no_two_labels_of_the_tokens_touch(record, events):
    whole = record.to_dict()
    one = {**whole["events"][0], "token": "Wwwwwwwwww"}
    longer = {"events": [one] * events, "probed": list(range(events + 1))}
    for name in ("logprob", "distance", "relative", "delta_norm"):
        longer[name] = [whole[name][0]] * (events + 1)
    longer["drift"] = [{**each, "event_norms": [1.0] * events} for each in whole["drift"]]
    for figure, _ in report.draw({**whole, **longer}).values():
        figure.draw_without_rendering()
        axis = figure.axes[1 if len(figure.axes) > 1 else 0].xaxis
        boxes = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert len(boxes) >= min(events, 30)
        assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))


def test_labels_show_what_cannot_be_seen_and_stay_short():
    assert [canvas.label(text) for text in (" the", "\n", " ", "", "a\u202eb")] == ["the", "⏎", "␣", "␣", "a\\u202eb"]
    assert canvas.label("x" * 40) == "x" * 13 + "…"


def test_a_heat_map_shows_every_number_and_marks_the_strongest(tmp_path):
    values_YX = torch.tensor([[0.5, -0.25, 0.0], [0.75, -3.34, 1.2]], dtype=torch.bfloat16)
    figure = fw.heat_map(values_YX, y="layer", x="head", center=0.5, strongest=2, path=tmp_path / "heads.png")
    axes = figure.axes[0]
    image = axes.images[0]
    torch.testing.assert_close(torch.tensor(image.get_array().data), values_YX.double())
    low, high = image.get_clim()
    assert 0.5 - low == high - 0.5 == pytest.approx(3.84, abs=0.01)
    marked = {text.get_position(): text.get_text() for text in axes.texts}
    assert marked == {(1, 1): "−3.34", (1, 0): "−0.25"}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "head")
    assert (tmp_path / "heads.png").read_bytes()[1:4] == b"PNG"
    assert "matplotlib.pyplot" not in sys.modules or figure.number is None


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_same_grid_gives_the_same_file(tmp_path, suffix):
    for name in ("one", "two"):
        fw.heat_map([[1, 2], [3, 4]], y="layer", x="head", title="$a$", path=tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_letters_that_the_font_lacks_are_one_warning(tmp_path):
    with pytest.warns(UserWarning, match="grid.png: matplotlib's font lacks 2 characters of the labels") as warned:
        fw.heat_map([[1, 2]], y="layer", x="position", x_labels=["字", "典字"], path=tmp_path / "grid.png")
    assert len(warned) == 1


def test_a_heat_map_of_small_cells_names_the_strongest_below():
    values_YX = torch.zeros(4, 150)
    values_YX[2, 77], values_YX[0, 3] = 5.125, math.nan
    axes = fw.heat_map(values_YX.tolist(), y="layer", x="position", strongest=1).axes[0]
    assert not axes.texts
    assert axes.get_xlabel() == "position\nstrongest (layer, position): 2, 77: 5.12"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(3), {}, r"values with shape \[3\]: expected a grid \[layer, head\]"),
        (torch.full((2, 2), math.nan), {}, "values with no finite number"),
        (torch.zeros(2, 3), {"x_labels": ["a", "b"]}, "got 2 x_labels for 3 of them"),
        (torch.zeros(2, 3), {"y_labels": ["a"]}, "got 1 y_labels for 2 of them"),
        (torch.zeros(2, 3), {"strongest": -1}, "strongest=-1"),
        (torch.zeros(2, 3), {"path": "grid.jpeg"}, "path='grid.jpeg'.*ends in .png, .svg or .pdf"),
    ],
)
def test_a_heat_map_refuses_what_it_cannot_draw(values, options, message):
    with pytest.raises(ValueError, match=message):
        fw.heat_map(values, y="layer", x="head", **options)


LENS = {"tokens": [[" a", EVIL], ["b", "c"]], "probabilities": [[0.75, 0.125], [0.5, 0.25]], "model": "tiny"}


def test_the_lens_page_shows_tokens_probabilities_and_ranks():
    text = report.lens_page(text=f"once {EVIL}", answer="b", ranks=[7, 0], settings={"site": "resid_post"}, **LENS)
    reader = Reader(text)
    head, first, last = reader.tables["logit lens"]
    assert head == ["layers passed", "rank of b", "first choice", "2."]
    assert first == ["0", "7", "␣a 75.0%", f"{EVIL} 12.5%"]
    assert last == ["1", "0", "b 50.0%", "c 25.0%"]
    assert "'b' is first after 1 layer; after the last it has rank 0." in reader.text
    assert f"once {EVIL}" in reader.text
    assert not any(tag == "script" for tag, _ in reader.elements)
    with pytest.raises(ValueError, match="got 2 tokens, 2 probabilities, 1 ranks and the answer 'b'"):
        report.lens_page(text="", answer="b", ranks=[1], **LENS)


def test_the_page_says_its_language_its_title_and_what_its_pictures_show(page):
    elements = Reader(page).elements
    assert ("html", {"lang": "en"}) in elements
    assert any(tag == "meta" and "width=device-width" in (at.get("content") or "") for tag, at in elements)
    pictures = [at for tag, at in elements if tag == "svg"]
    assert len(pictures) == 3
    assert all(at["role"] == "img" and len(at["aria-label"]) > 40 for at in pictures)
    assert [tag for tag, _ in elements if tag in ("h1", "h2")].count("h1") == 1
    assert page.count("<figcaption>") == 3
    ids = [at["id"] for _, at in elements if "id" in at]
    assert len(ids) == len(set(ids))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="measured in Chromium, which is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_the_page_is_as_wide_as_its_window_and_asks_for_nothing(page, tmp_path, width):
    opened = page.replace("<details>", "<details open>")
    wrapper = f"""<!DOCTYPE html><iframe id=page style="width:{width}px;height:900px;border:0"
srcdoc="{html.escape(opened)}"></iframe><p id=said></p><script>
document.getElementById("page").onload = (event) => {{
  const inside = event.target.contentWindow, root = inside.document.documentElement;
  const seen = [...inside.document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().height > 100);
  const asked = inside.performance.getEntriesByType("resource").map((each) => each.name.slice(0, 40));
  said.textContent = JSON.stringify([root.scrollWidth, inside.innerWidth, seen, asked, inside.document.title]);
}};</script>"""
    (tmp_path / "wrapper.html").write_text(wrapper, encoding="utf-8")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", "--virtual-time-budget=5000"]
    command = ["chromium", *flags, (tmp_path / "wrapper.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = re.search(r'<p id="said">(.*?)</p>', done.stdout, re.DOTALL)
    assert said, done.stderr[-2000:]
    scroll, inner, seen, asked, title = json.loads(html.unescape(said[1]))
    assert (inner, title) == (width, "fastweights report")
    assert scroll <= inner
    assert seen == [True] * 3
    assert asked == []
