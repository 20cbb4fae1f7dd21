"""The pages: whole, valid, nothing asked of a network, what strangers wrote shown as text; and in a browser."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers import invoke, make_pair, refused, run

pytest.importorskip("vl_convert")
pytest.importorskip("itables")

from tailorcli.display.inspection import inspect_path
from tailorcli.display.web.pages import page_of
from tailorcli.display.web.shell import Page, render

HOSTILE = "</script><img src=x onerror=alert(1)>&{{7*7}}"
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Reader(HTMLParser):
    """Tags in balance, the attributes that fetch, the text of each element by its tag."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetches, self.texts, self.tags = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = dict(attributes)
        self.fetches += [names[key] for key in ("src", "href", "action", "srcset", "data") if key in names]
        assert not any(name.startswith("on") for name in names)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def data_in(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def own_part(text):
    """The page without the libraries in it, which name the addresses of their licences and schemas."""
    return re.sub(r"(?s)<script>.*?</script>|<script type=\"module\">.*?</script>|<style>.*?</style>", "", text)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = make_pair(tmp_path_factory.mktemp("page"), layers=3)
    few = ("--num-samples", 4, "--seq-len", 16)
    run("calibrate", folder / "tuned", "--data", folder / "data.jsonl", *few, "-o", folder / "stats")
    run("calibrate", folder / "base", "--synthetic", *few, "-o", folder / "base-stats")
    both = ("--stats", folder / "stats", "--retain", folder / "base-stats")
    outputs = ("-o", folder / "out", "--patch-file", folder / "p.safetensors")
    trained = ("--distill", "--distill-steps", 4, "--exclude", "*.2.*norm*")
    shown = run("patch", folder / "base", folder / "tuned", *both, *outputs, *trained, "--html", folder / "patch.html")
    assert f"wrote {folder / 'patch.html'}" in shown.stderr
    run("patch", folder / "base", folder / "tuned", *both, "-o", folder / "closed", "--html", folder / "closed.html")
    run("score", folder / "base", folder / "tuned", "--stats", folder / "stats", "-o", folder / "score.json")
    quick = ("--solver", "none", "--omega", 1)
    run("patch", folder / "base", folder / "tuned", "--patch-file", folder / "q.safetensors", *quick)
    files = (folder / "p.safetensors", folder / "q.safetensors")
    run("merge-multi", folder / "base", *files, "--method", "patches", "-o", folder / "merged")
    models = [folder / name for name in ("base", "tuned", "out")]
    tasks = [f"{name}={folder / 'data.jsonl'}:text" for name in ("old", "new")]
    roles = ("--task", tasks[0], "--origin", "old", "--task", tasks[1], "--target", "new")
    run("evaluate", *models, *roles, "--limit", 6, "--write-card", "-o", folder / "evaluation.json")
    return folder


PATHS = ["out", "p.safetensors", "out/tailor_report.json", "score.json", "merged", "stats", "base"]


@pytest.mark.parametrize("path", PATHS)
def test_a_page_is_valid_and_asks_nothing_of_a_network(made, tmp_path, path):
    run("inspect", made / path, "--html", tmp_path / "page.html", "--quiet")
    text = (tmp_path / "page.html").read_text()
    page = Reader(text)
    assert page.fetches == []
    assert page.tags.count("h1") == 1
    assert "://" not in own_part(text)
    assert "default-src 'none'" in text
    for spec in data_in(text)["charts"]:
        import vl_convert

        assert vl_convert.vegalite_to_vega(spec)["marks"]  # a picture that Vega-Lite understands


@pytest.mark.parametrize(("name", "page"), [("out", "patch.html"), ("closed", "closed.html")])
def test_every_figure_of_the_report_is_in_the_table(made, name, page):
    report = json.loads((made / name / "tailor_report.json").read_text())
    table = data_in((made / page).read_text())["tables"][0]
    assert ("error before" in str(table["columns"])) == (name == "closed")  # of what is trained there are none
    titles = [title for title, _ in table["columns"]]
    rows = {row[0]: dict(zip(titles, row, strict=True)) for row in table["rows"]}
    assert len(rows) == len(report["tensors"])
    for tensor in report["tensors"]:
        row = rows[tensor["name"].removeprefix("model.layers.").removesuffix(".weight")]
        assert row["weights"] == (tensor["numel"] if "numel" in tensor else row["weights"])
        if tensor["status"] == "base":
            assert row["note"] == tensor["reason"]
            continue
        assert row["kept"] == tensor["kept"]
        assert row["|ΔW|² kept"] == tensor["delta_sq_kept"] / tensor["delta_sq"]
        assert [row.get("error before"), row.get("after"), row.get("drift")] == [
            tensor[key] for key in ("error_before", "error_after", "drift")
        ]


def test_the_page_says_what_was_done_what_came_out_and_how_to_do_it_again(made):
    page = Reader((made / "patch.html").read_text())
    said = " ".join(page.texts["p"])
    report = json.loads((made / "out" / "tailor_report.json").read_text())
    assert "Of each tensor that is patched this model keeps the 10% that matter most" in said
    assert f"It keeps {report['totals']['kept']:,} of {report['totals']['numel']:,} weights" in said
    command = " ".join(page.texts["pre"])
    assert f"tailorcli patch {made / 'base'}" in command
    assert "--distill-steps 4" in command
    assert "Training the kept weights" in page.texts["h2"]
    curves = data_in((made / "patch.html").read_text())["charts"][-1]["layer"][0]["data"]["values"]
    found = [row["value"] for row in curves]
    assert found == report["distillation"]["new"] + report["distillation"]["retained"]


def titles_of(page: Page):
    return [section.title for section in page.sections]


def test_an_evaluation_is_drawn_where_it_is_of_this_model(made, tmp_path):
    page = page_of(inspect_path(made / "out"))
    rows = page.sections[0].chart["layer"][-1]["data"]["values"]
    assert titles_of(page)[0] == "Old against new"
    assert {row["name"]: row["series"] for row in rows} == {"base": "base", "tuned": "fine-tuned", "out": "this model"}
    assert [tile.label for tile in page.tiles][:3] == ["old tasks, %", "new tasks, %", "H"]
    assert "Measured, it is right in" in page.said[2]
    given = page_of(inspect_path(made / "p.safetensors"), made / "evaluation.json")  # named, whatever it is of
    assert titles_of(given)[0] == "Old against new"
    shutil.copytree(made / "out", tmp_path / "other")
    found = json.loads((tmp_path / "other" / "tailor_evaluation.json").read_text())
    (tmp_path / "other" / "tailor_evaluation.json").write_text(json.dumps(found | {"fingerprint": "another"}))
    assert "Old against new" not in titles_of(page_of(inspect_path(tmp_path / "other")))


def test_what_strangers_wrote_is_text(made, tmp_path):
    report = json.loads((made / "out" / "tailor_report.json").read_text())
    patched = next(tensor for tensor in report["tensors"] if tensor["status"] == "patched")
    patched["name"] = patched["note"] = HOSTILE
    left = next(tensor for tensor in report["tensors"] if tensor["status"] == "base")
    left["reason"] = HOSTILE
    report["inputs"]["tuned"]["path"] = f"a/{HOSTILE}"
    file = tmp_path / "r<i>.json"
    file.write_text(json.dumps(report))
    text = render(page_of(inspect_path(file)))
    page = Reader(text)
    assert not {"img", "i"} & set(page.tags)
    assert page.fetches == []
    assert any(HOSTILE in cell for row in data_in(text)["tables"][0]["rows"] for cell in row if isinstance(cell, str))
    assert HOSTILE in page.texts["dt"]


def changed(made, tmp_path, path, change):
    """The page of a report that ``change`` has altered."""
    report = json.loads((made / path).read_text())
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    return page_of(inspect_path(tmp_path / "report.json"))


def test_figures_towards_a_teacher_say_so(made, tmp_path):
    folder = ("closed/tailor_report.json", lambda report: report["options"].update(teacher_weight=0.5))
    page = changed(made, tmp_path, *folder)
    assert "are off those of the model 0.5 of the way from the base to the fine-tuned model by" in page.said[1]
    assert {"layer error to its teacher", "drift on what to keep"} <= {tile.label for tile in page.tiles}
    assert "teacher weight 0.5" in run("inspect", tmp_path / "report.json").stdout


@pytest.mark.parametrize(
    ("best", "new", "said"),
    [
        (4, [0.3, 0.2], "nearer to the fine-tuned model (0.3 to 0.2) and nearer to the base (0.5 to 0.4)"),
        (4, [0.3, 0.31], "further from the fine-tuned model (0.3 to 0.31) and nearer to the base"),
        (0, [0.3, 0.2], "Training gained nothing"),
    ],
)
def test_what_training_did_is_said_as_it_was(made, tmp_path, best, new, said):
    curves = {"steps": [0, 4], "new": new, "retained": [0.5, 0.4], "best": best}
    folder = ("out/tailor_report.json", lambda report: report.update(distillation=report["distillation"] | curves))
    assert said in changed(made, tmp_path, *folder).said[2]


def test_depth_is_the_layers_own_number_and_each_stack_has_its_own_picture(made, tmp_path):
    def only_later(report):
        for tensor in report["tensors"]:
            tensor["name"] = tensor["name"].replace("layers.0", "layers.7")

    def two_stacks(report):
        for tensor in report["tensors"]:
            if "k_proj" in tensor["name"]:
                tensor["name"] = f"vision.{tensor['name']}"

    page = changed(made, tmp_path, "closed/tailor_report.json", only_later)
    [chart] = [section.chart for section in page.sections if section.title.startswith("Error by depth")]
    assert {row["layer"] for row in chart["layer"][0]["data"]["values"]} == {1, 2, 7}
    page = changed(made, tmp_path, "closed/tailor_report.json", two_stacks)
    assert {"Error by depth, model", "Error by depth, vision"} <= set(titles_of(page))


def test_the_command_of_a_score_runs(made, tmp_path):
    for number, given in enumerate(((), ("--retain", made / "base-stats"), ("--omega", 1, "--exclude", "*norm*"))):
        first, again = tmp_path / f"{number}.json", tmp_path / f"{number}-again.json"
        run("score", made / "base", made / "tuned", "--stats", made / "stats", *given, "-o", first)
        command = page_of(inspect_path(first)).sections[-1].command.replace("\\\n", "")
        _, *words = (again if word == "REPORT.json" else word for word in shlex.split(command))
        run(*words)
        one, two = (json.loads(file.read_text()) for file in (first, again))
        assert (one["tensors"], one["options"]) == (two["tensors"], two["options"])


def test_a_dense_method_claims_no_mask(made, tmp_path):
    run("patch", made / "base", made / "tuned", "-o", tmp_path / "out", "--method", "interpolate", "--weight", 0.5)
    page = page_of(inspect_path(tmp_path / "out"))
    assert page.said[1].startswith("Any of the")
    assert [tile.label for tile in page.tiles] == ["of the weights may differ"]


def test_a_measurement_without_roles_is_no_lack_of_one(made, tmp_path):
    shutil.copytree(made / "out", tmp_path / "out")
    run("evaluate", tmp_path / "out", "--task", f"t={made / 'data.jsonl'}:text", "--limit", 3, "--write-card")
    page = page_of(inspect_path(tmp_path / "out"))
    assert page.said[2].startswith("It was measured")


def test_where_a_page_may_be_written(made, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<p>mine</p>")
    refused("inspect", made / "out", "--html", page, mentions=["not a page that tailorcli wrote"])
    assert page.read_text() == "<p>mine</p>"
    refused("inspect", made / "out", "--html", tmp_path / "page.txt", mentions=[".html"])
    refused("inspect", made / "out", "--html", made / "out" / "page.html", mentions=["lies inside an input"])
    refused(
        "inspect",
        made / "out",
        "--html",
        tmp_path / "x.html",
        "--evaluation",
        made / "score.json",
        mentions=["no evaluation"],
    )
    assert not (tmp_path / "x.html").exists()
    run("inspect", made / "out", "--html", tmp_path / "new.html")
    run("inspect", made / "base", "--html", tmp_path / "new.html")  # over an earlier page of ours
    assert invoke("inspect", made / "out", "--evaluation", made / "evaluation.json").exit_code == 2


def test_without_the_libraries_the_error_names_the_extra(made, tmp_path, monkeypatch):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "itables" else original(name))
    assert "tailorcli[html]" in refused("inspect", made / "out", "--html", tmp_path / "p.html", mentions=["itables"])


@pytest.fixture(scope="module")
def swept(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    tasks = [f"{name}={made / 'data.jsonl'}:text" for name in ("old", "new")]
    roles = ("--task", tasks[0], "--origin", "old", "--task", tasks[1], "--target", "new")
    settings = ("--density", 0.1, "--density", 0.3, "--omega", 1, "--solver", "none", "--method", "interpolate")
    run(
        "sweep",
        made / "base",
        made / "tuned",
        "-o",
        folder / "dir",
        *roles,
        *settings,
        "--limit",
        3,
        "--html",
        folder / "page.html",
    )
    return folder


def test_a_sweep_has_every_setting_with_its_command(made, swept, tmp_path):
    text = (swept / "page.html").read_text()
    assert Reader(text).fetches == []
    report = json.loads((swept / "dir" / "sweep.json").read_text())
    chart, table = data_in(text)["charts"][0], data_in(text)["tables"][0]
    points = {row["name"]: row for row in chart["layer"][-1]["data"]["values"]}
    assert points.keys() == {point["label"] for point in report["points"]} == {row[0] for row in table["rows"]}
    for point in report["points"]:
        assert points[point["label"]]["old"] == point["test"]["origin"]["value"]
    _, *words = points["interpolate 0.5"]["command"].replace("\\\n", "").split()
    run(*(tmp_path / "made" if word == "OUT" else word for word in words))
    run("verify", tmp_path / "made", "--base", made / "base")


def test_a_name_of_a_column_is_text_in_a_browser(made, tmp_path, browser):
    def renamed(report):
        report["options"]["tasks"][0] = "<img src=x onerror='document.title = 1'>"
        for tensor in report["tensors"]:
            if tensor["status"] == "patched":
                tensor |= {"kind": "full", "errors": [0.5, 0.5]}

    page = changed(made, tmp_path, "merged/tailor_report.json", renamed)
    file = tmp_path / "page.html"
    file.write_text(render(page))
    drawn = opened(browser, file)
    assert drawn.locator("img").count() == 0
    assert "error to <img" in " ".join(drawn.locator("thead th").all_inner_texts())
    assert drawn.title() != "1"


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


def opened(browser, file, **settings):
    """A page in a browser, with what it asked for and complained of."""
    page = browser.new_context(**settings).new_page()
    page.asked, page.complaints = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(Path(file).as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
    return page


def names_in(page):
    return page.locator("table tbody td:first-child").all_inner_texts()


def test_a_browser_draws_sorts_and_filters_and_fetches_nothing(made, swept, browser):
    file = made / "patch.html"
    for of, charts in ((file, 2), (made / "closed.html", 3)):
        page = opened(browser, of, color_scheme="dark", viewport={"width": 1100, "height": 800})
        assert page.asked == [of.as_uri()]
        assert page.complaints == []
        assert page.locator("[data-chart] svg").count() == page.locator("[data-chart]").count() == charts
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(16, 22, 29)"  # dark, as the system asks for
    before = names_in(page)
    page.get_by_role("searchbox").fill("down_proj")
    assert names_in(page) == [name for name in before if "down_proj" in name]
    page.get_by_role("searchbox").fill("")
    page.locator("select").first.select_option("q_proj")
    assert [name.rpartition(".")[2] for name in names_in(page)] == ["q_proj"] * 3
    page.locator("select").first.select_option("")
    heading = page.locator("thead th", has_text="weights")
    column = page.locator("thead th").all_inner_texts().index("weights") + 1
    for order in ("ascending", "descending"):
        heading.click()
        page.locator(f"thead th[aria-sort={order}]", has_text="weights").wait_for()  # it sorts after the click
        texts = page.locator(f"table tbody td:nth-child({column})").all_inner_texts()
        counts = [int(text.replace(",", "")) for text in texts if text]
        assert counts == sorted(counts, reverse=order == "descending")
    page.locator(".vega-bind-radio input").nth(1).check()
    assert page.complaints == []
    narrow = opened(browser, file, viewport={"width": 390, "height": 800})
    assert narrow.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out
    page = opened(browser, swept / "page.html")
    assert page.complaints == []
    page.locator("[data-chart] g.mark-symbol.role-mark path").last.click(force=True)
    command = page.locator("section .command pre").inner_text()
    assert command.startswith(f"tailorcli patch {made / 'base'}")
    page.locator("table button.copy").first.click()
    page.get_by_role("button", name="Copied").wait_for(timeout=60_000)
