"""train.report: a self-contained page with the contents of the run."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from dspnet_fast.cost import mac_count, parameter_count
from dspnet_fast.models import build, family
from dspnet_fast.ops import normalized_mse
from dspnet_fast.slim import slim
from tests.commands import run
from train import evaluate, export, report
from train.cli import DONE, WRONG_INPUT
from train.evaluation import drawing
from train.evaluation.collapse import collapsed
from train.evaluation.plot_data import Point
from train.pretraining.dspnet import VIEWS
from train.reporting import figures
from train.reporting.findings import Run, network_summaries

DNS = ["c8-d1111", "c8-d1121", "c16-d2121"]
VOID = {"meta", "img", "source"}


class Page(HTMLParser):
    """Check that tags nest; collect links, tables and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.images, self.rows, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        for name, value in attributes:
            if name in ("src", "srcset", "href", "data", "action", "poster"):
                self.links.append(value)
            if tag == "img" and name == "alt":
                self.images.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "tr" in self.open and self.open[-1] != "tr" and data.strip():
            self.rows[-1][-1] += data
        if "style" not in self.open:
            self.text.append(data)


def page_of(out):
    """The page of a run."""
    return Page((out / "report" / "index.html").read_text())


def text_of(page):
    return " ".join("".join(page.text).split())


@pytest.fixture
def out(finished, tmp_path, monkeypatch):
    """A copy of the finished run without evaluations; figures are replaced by one pixel."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    monkeypatch.setattr(drawing, "png", lambda draw, theme=None: file.getvalue())
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("exported", "evaluation"))


def results(protocol, **columns):
    """A report of an evaluation as train.evaluate writes it."""
    networks = {
        name: {"parameters": 10**5 * 4**i, "macs": 10**6 * 2**i, "features": 8}
        | {column: {"top1": accuracy + 0.1 * i, "top5": 0.9, "interval": 0.01} for column, accuracy in columns.items()}
        for i, name in enumerate(DNS)
    }
    return {"protocol": protocol, "data": "photos", "test_images": 1234, "step": 20, "networks": networks}


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory):
    """A run with evaluations of two protocols and an export."""
    out = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("exported", "evaluation"))
    assert run(evaluate, "knn", out, "--baselines", "--k", 5, "--workers", 0) == DONE
    semi = results("semi", **{"1 % linear": 0.2, "10 % linear": 0.3, "1 % finetune": 0.4})
    (out / "evaluation" / "semi.json").write_text(json.dumps(semi))
    assert run(export, out, "--threads", 1) == DONE
    assert run(report, out) == DONE
    return out


def test_page_is_self_contained(reported):
    text = (reported / "report" / "index.html").read_text()
    page = Page(text)
    assert page.links and all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    markup = re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert not re.search(r"https?:|//|url\(|@import|\bon\w+=", markup)
    assert "prefers-color-scheme: dark" in markup and text.startswith("<!doctype html>")
    assert all(page.images) and len(page.images) == len(page.links) // 2


def test_embedded_images_decode_and_are_saved_as_png(reported):
    sources = page_of(reported).links
    pictures = [base64.b64decode(link.partition(",")[2], validate=True) for link in sources]
    for dark, light in zip(pictures[::2], pictures[1::2]):
        images = [Image.open(io.BytesIO(png)) for png in (dark, light)]
        assert images[0].size == images[1].size and images[0].size[0] >= 800
        corners = [sum(image.convert("RGB").getpixel((0, 0))) for image in images]
        assert corners[0] < 150 and corners[1] == 3 * 255
        assert all(len(image.convert("RGB").getcolors(2**20)) > 20 for image in images), "the figure is not empty"
    files = {path.read_bytes() for path in (reported / "report").glob("*.png")}
    assert files == set(pictures[1::2])


def test_page_states_the_duration_of_the_training(reported):
    recorded = [json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(8 / line["images_per_second"] for line in recorded if "images_per_second" in line)  # log_steps is 1
    assert f"Training took {seconds:.0f} s." in text_of(page_of(reported))
    found = json.loads((reported / "report" / "report.json").read_text())["training_seconds"]
    assert found == pytest.approx(seconds)


def test_first_table_has_costs_latency_and_accuracies(reported):
    page = page_of(reported)
    heading, *rows = page.rows[:4]
    assert page.tags.index("table") < page.tags.index("figure")
    assert [row[0] for row in rows] == DNS
    assert heading[:5] == ["network", "parameters", "MACs", "torch ms", "kNN %"]
    assert heading[5:] == [
        *("kNN untrained %", "semi 1 % linear %", "semi 10 % linear %", "semi 1 % finetune %"),
    ]
    knn = json.loads((reported / "evaluation" / "knn.json").read_text())["networks"]
    for index, (row, dn) in enumerate(zip(rows, DNS)):
        cells = dict(zip(heading, row))
        network = slim(build("resnet", family("resnet", [dn]).full, "small"), None)
        assert cells["parameters"] == f"{parameter_count(network):,}"
        assert cells["MACs"] == f"{mac_count(network, 12) / 1e6:,.1f} M"
        result = knn[dn]["pretrained"]
        assert cells["kNN %"] == f"{100 * result['majority']:.1f} ± {100 * result['interval']:.1f}"
        assert cells["semi 10 % linear %"] == f"{30 + 10 * index}.0 ± 1.0"
        assert float(cells["torch ms"]) > 0
    assert "threads: 1" in text_of(page) and "No network collapsed" in text_of(page)

    table = json.loads((reported / "report" / "report.json").read_text())
    assert [network["network"] for network in table["networks"]] == DNS and table["step"] == 20
    assert table["networks"][2]["accuracies"]["semi 1 % linear"] == {"accuracy": 0.4, "interval": 0.01, "step": 20}


def test_collapse_indicators_are_those_of_the_last_measurement(reported):
    lines = [json.loads(line) for line in (reported / "metrics.jsonl").read_text().splitlines()]
    probe = next(line for line in reversed(lines) if "feature_std" in line)
    page = page_of(reported)
    start = page.rows.index(["network", "feature std", "effective rank", "cosine similarity to the target"])
    for row, dn in zip(page.rows[start + 1 :], DNS):
        loss = next(line["loss"][dn] for line in reversed(lines) if dn in line.get("loss", ()))
        assert row[1:] == [
            f"{probe['feature_std'][dn]:.3f}",
            f"{probe['effective_rank'][dn]:.1f}",
            f"{1 - loss / 4:.3f}",
        ]
        assert row[0] == dn


def test_every_evaluation_has_its_figures(reported):
    drawn = {path.name for path in (reported / "report").glob("*.png")}
    assert drawn == {
        *(f"accuracy-{protocol}-{cost}.png" for protocol in ("knn", "semi") for cost in drawing.COSTS),
        *(f"training-{name}.png" for name in ("loss", "learning_rate", "images_per_second", "data_wait")),
        *(f"collapse-{name}.png" for name in ("feature_std", "effective_rank", "knn", "cosine")),
    }
    assert "semi on photos, 1,234 test images, after 20 steps" in text_of(page_of(reported))


def test_cosine_similarity_follows_from_the_loss():
    predictions, targets = torch.randn(2, 6, 8, dtype=torch.float64)
    loss = VIEWS * normalized_mse(predictions, targets)
    torch.testing.assert_close(1 - loss / 4, F.cosine_similarity(predictions, targets).mean())


@torch.no_grad()
def test_accuracy_figure_has_points_and_intervals():
    points = [Point("b", 2e6, 9e6, 0.5, 0.01), Point("a", 1e6, 1e6, 0.4, 0.02)]
    draw = drawing.accuracy_figure({"kNN": points, "linear": points[:1]}, {"raw pixels": 0.3}, "accuracy", "parameters")
    (axes,) = draw(drawing.LIGHT).axes
    first, second = (container.lines[0] for container in axes.containers)
    assert list(first.get_xdata()) == [1, 9] and list(first.get_ydata()) == [40, 50]
    assert list(second.get_xdata()) == [9]
    low, high = axes.containers[0].lines[1]
    assert list(low.get_ydata()) == [38, 49] and list(high.get_ydata()) == [42, 51]
    assert {text.get_text() for text in axes.texts} == {"a", "b"}
    assert axes.get_xscale() == "log", "the costs differ by a factor of nine"
    (macs,) = drawing.accuracy_figure({"kNN": points}, {}, "accuracy", "macs")(drawing.DARK).axes
    assert macs.get_xscale() == "linear"


@pytest.mark.parametrize("count", [1, 239, 240, 241, 5000])
def test_long_curves_are_averaged(count):
    values = [float(value) for value in range(count)]
    averaged = figures.averaged(values)
    assert len(averaged) == min(count, len(averaged)) <= figures.POINTS
    assert averaged == sorted(averaged) and (count > figures.POINTS or averaged == values)
    group = -(-count // figures.POINTS)
    assert averaged[0] == sum(values[:group]) / group


@pytest.mark.parametrize(
    ("std", "rank", "expected"),
    [
        (0.5, 10.0, False),
        (0.05, 10.0, True),
        (0.5, 1.2, True),
        (math.nan, 10.0, True),
        (0.5, math.nan, True),
        (0.5, None, False),
        (None, None, False),
    ],
)
def test_collapsed_if_an_indicator_is_low_or_nan(std, rank, expected):
    assert collapsed(std, rank) == expected


def test_collapsed_networks_are_named(out):
    with open(out / "metrics.jsonl", "a") as file:
        values = {"feature_std": dict.fromkeys(DNS, 0.5), "effective_rank": dict(zip(DNS, (9.0, math.nan, 1.5)))}
        file.write(json.dumps({"step": 21, **values}) + "\n")
    assert run(report, out) == DONE
    assert "Collapsed: c8-d1121, c16-d2121" in text_of(page_of(out))
    networks = json.loads((out / "report" / "report.json").read_text())["networks"]
    assert [network["collapsed"] for network in networks] == [False, True, True]
    assert networks[1]["effective_rank"] is None, "JSON has no NaN"


def test_missing_results_are_stated_and_not_drawn(out):
    assert run(report, out) == DONE
    text = text_of(page_of(out))
    assert "Not evaluated yet: run dspnet-evaluate knn OUT" in text
    assert "Not compared yet: dspnet-compare writes compare.json" in text
    assert not list((out / "report").glob("accuracy-*"))
    assert page_of(out).rows[0] == ["network", "parameters", "MACs"]

    (out / "metrics.jsonl").unlink()
    assert run(report, out) == DONE
    text = text_of(page_of(out))
    assert "Collapse indicators were not measured" in text and "Nothing recorded yet" in text
    assert [path.name for path in (out / "report").iterdir() if path.suffix == ".png"] == [], (
        "earlier figures are deleted"
    )
    assert "0 of 2 epochs" in text


def test_invalid_compare_json_is_refused(out, capsys):
    for text in ("{", '{"ratio": 0.47}', "[]"):
        (out / "compare.json").write_text(text)
        assert run(report, out) == WRONG_INPUT
        assert "compare.json is" in capsys.readouterr().err


def test_other_and_outdated_evaluations_are_noted(out, capsys):
    (out / "evaluation").mkdir()
    (out / "evaluation" / "linear.json").write_text(json.dumps({**results("linear", linear=0.5), "step": 10}))
    (out / "evaluation" / "notes.json").write_text('{"a": 1}')
    assert run(report, out) == DONE
    text = text_of(page_of(out))
    assert "Not shown, because they contain no accuracies of networks: notes.json" in text
    assert "linear.json evaluates step 10, not the last step: run dspnet-evaluate linear OUT again" in text
    (out / "evaluation" / "notes.json").write_text("{")
    assert run(report, out) == WRONG_INPUT
    assert "notes.json is damaged" in capsys.readouterr().err


def test_evaluation_of_some_networks_leaves_other_cells_empty(out):
    partial = results("linear", linear=0.5)
    partial["networks"] = {"c8-d1121": partial["networks"]["c8-d1121"], "alone": partial["networks"]["c8-d1111"]}
    (out / "evaluation").mkdir()
    (out / "evaluation" / "linear.json").write_text(json.dumps(partial))
    networks = network_summaries(Run(out))
    assert [bool(network["accuracies"]) for network in networks] == [False, True, False]
    assert run(report, out) == DONE
    column = page_of(out).rows[0].index("linear %")
    assert [row[column] for row in page_of(out).rows[1:4]] == ["–", "60.0 ± 1.0", "–"]


def test_folder_without_a_run_is_refused_and_help_has_an_example(tmp_path, capsys):
    assert run(report, tmp_path) == WRONG_INPUT
    assert "holds no run" in capsys.readouterr().err and not list(tmp_path.iterdir())
    assert run(report, "--help") == DONE
    assert "examples:" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_browser_shows_light_and_dark_page(reported, tmp_path):
    """The browser's preferredColorScheme is 0 for dark and 1 for light."""
    for scheme, background in ((1, (0xF4, 0xF5, 0xF7)), (0, (0x12, 0x14, 0x18))):
        picture = tmp_path / f"{scheme}.png"
        options = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
        options += "--disable-component-update --disable-sync --hide-scrollbars --window-size=1280,1600 "
        options += f"--blink-settings=preferredColorScheme={scheme}"
        subprocess.run(
            ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}"]
            + [(reported / "report" / "index.html").as_uri()],
            check=True,
            capture_output=True,
            timeout=120,
        )
        image = Image.open(picture).convert("RGB")
        assert image.size == (1280, 1600) and image.getpixel((3, 3)) == background
        blue = (0x25, 0x63, 0xA8) if scheme else (0x6A, 0xA9, 0xEE)  # the first series of the accuracies
        assert any(all(abs(a - b) < 12 for a, b in zip(pixel, blue)) for _, pixel in image.getcolors(2**21))


def test_curves_have_distinct_colours_or_dashes_and_labels_apart():
    names = [f"w{k}" for k in range(9)]
    looks = [tuple(style.values()) for style in figures.styles(names, drawing.LIGHT).values()]
    assert len(set(looks)) == 9 and len({colour for colour, _ in looks[:6]}) == 6
    figure = figures.curves({name: ([0, 1], [1.0, 0.5]) for name in names}, "loss")(drawing.LIGHT)
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    heights = sorted(text.xy[1] for text in axes.texts)
    assert [text.get_text() for text in axes.texts] == names
    assert all(b - a > 0.05 * (high - low) for a, b in zip(heights, heights[1:]))


def test_first_table_has_raw_pixels_below_the_networks(trained):
    evaluate_knn = ["knn", trained, "--k=5", "--workers=0", "--device=cpu", "--baselines"]
    assert run(evaluate, *evaluate_knn) == DONE and run(report, trained) == DONE
    page = Page((trained / "report" / "index.html").read_text())
    found = json.loads((trained / "evaluation" / "knn.json").read_text())["raw_pixels"]
    score = f"{100 * found['majority']:.1f} ± {100 * found['interval']:.1f}"
    rows = [row for row in page.rows if row and row[0] == "raw pixels"]
    assert len(rows) == 1 and score in rows[0] and rows[0][1:3] == ["–", "–"]
