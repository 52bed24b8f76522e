"""The report finds the first tensor that rounding does not explain, and only then; on our models and on others'."""

import dataclasses
import html.parser
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import jax_impl.attention
import jax_impl.model
import jax_impl.muon.alias
import jax_impl.products
import parity_tests.sides
from harness.folders import save_folder
from parity_tests import example, twins
from parity_tests.cases import AWKWARD, FLOAT32, PRECISIONS, VARIANTS, random_tokens, random_weights, run_config
from parity_tests.compare import report as report_module
from parity_tests.compare.errors import CompareError
from parity_tests.compare.functions import compare
from parity_tests.compare.report import COLOURS, EXACT, INFINITE, Coverage, Report, Row
from parity_tests.contract import process_contract
from recipe.config import UserError
from recipe.contract import MUST_AGREE, require_same
from tests import browser
from tests.test_documents import LIMIT

ROOT = Path(__file__).resolve().parents[1]
SMALL = dataclasses.replace(AWKWARD, num_hidden_layers=2)
LAYER = "model.layers.1"


def subject(model=SMALL, steps: int = 0, **fields) -> twins.Subject:
    config, tokens = run_config(model, FLOAT32, accumulation=2), random_tokens(model, 2, 8)
    return twins.Subject(config, random_weights(model), tokens, steps=steps, backward=True, **fields)


def report(*dtypes: str, **fields) -> Report:
    return twins.compare_subject(subject(**fields), dtypes, title="small")


@pytest.fixture(scope="module")
def everything() -> Report:
    return report(*PRECISIONS, steps=2)


def test_the_twins_and_transformers_agree_in_every_dtype(everything):
    found = everything
    assert found.exit_code == 0, found.verdict()
    sides = {(row.dtype, side) for row in found.rows for side in row.errors}
    assert sides == {("float64", "jax")} | {
        (dtype, side) for dtype in ("float32", "bfloat16") for side in ("jax", "torch", "transformers")
    }
    names = {row.name for row in found.rows}
    assert {
        "forward model.embed_tokens",
        "forward model.layers.1.self_attn.q_rope",
        "forward logits",
        "backward model.layers.0.mlp.hidden",
        "gradient model.layers.1.self_attn.k_norm.weight",
        "step 2 mu model.layers.0.mlp.up_proj.weight",
        "step 2 parameter model.norm.weight",
    } <= names
    # Errors are errors: nothing but copies and single sums may be exact in bfloat16.
    narrow = [row for row in found.rows if row.dtype == "bfloat16" and row.name.startswith("backward")]
    assert all(row.errors[side] > 0 for row in narrow for side in row.errors)


@pytest.mark.parametrize(
    "variant", ["no-qk-norm", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bias", "untied", "window"))]
)
def test_transformers_has_every_variant_at_the_same_taps(variant):
    found = report("float32", model=VARIANTS[variant])
    assert found.exit_code == 0, found.verdict()
    compared = [row.name for row in found.rows if "transformers" in row.errors]
    assert {name.partition(" ")[0] for name in compared} == {"forward", "backward", "gradient"}
    ours = [row.name for row in found.rows if "jax" in row.errors]
    assert len(compared) > 0.9 * len(ours)


def test_dropout_is_compared_without_transformers():
    model = dataclasses.replace(SMALL, num_hidden_layers=1, dropout=0.3)
    found = report("float64", model=model)
    assert found.exit_code == 0, found.verdict()
    assert any("transformers is left out" in note for note in found.notes)


class Gelu(jax_impl.model.Qwen3MLP):
    """A bug in one layer: another activation."""

    def __call__(self, x_BTD, dropout_key):
        gate_BTF, up_BTF = self.gate_proj(x_BTD), self.up_proj(x_BTD)
        activation = jax.nn.gelu if self.layer == 1 else jax.nn.silu
        return self.down_proj(activation(gate_BTF) * up_BTF)


def transposed_gradient(original):
    """A bug in the backward pass alone: the gradient of keys is taken from the wrong heads."""

    def backward(spec, dtype, residuals, cotangent):
        grad_x, grad_y = original(spec, dtype, residuals, cotangent)
        return grad_x, grad_y[:, :, ::-1] if spec == "xqh,xsh->xqs" else grad_y

    return backward


def plant_forward(monkeypatch):
    monkeypatch.setattr(jax_impl.model, "Qwen3MLP", Gelu)


def plant_backward(monkeypatch):
    product = jax_impl.products.product
    wrong = jax.custom_vjp(product.fun, nondiff_argnums=product.nondiff_argnums)
    wrong.defvjp(jax_impl.products._product_forward, transposed_gradient(jax_impl.products._product_backward))
    monkeypatch.setattr(jax_impl.attention, "product", wrong)


def plant_optimizer(monkeypatch):
    monkeypatch.setattr(jax_impl.muon.alias, "scale_by_fan_ratio", lambda **_: optax.identity())
    monkeypatch.setattr(parity_tests.sides, "_make_train_step", jax_impl.train.make_train_step)


@pytest.mark.parametrize(
    ("plant", "steps", "expected", "inputs"),
    [
        (plant_forward, 0, f"forward {LAYER}.mlp.hidden", {f"forward {LAYER}.mlp.gate_proj"}),
        (
            plant_backward,
            0,
            "backward model.layers.1.self_attn.k_rope",
            {"backward model.layers.1.self_attn.attention"},
        ),
        (plant_optimizer, 1, "step 1 update model.layers.0.self_attn.q_proj.weight", set()),
    ],
    ids=["forward", "backward", "optimizer"],
)
def test_a_planted_bug_is_the_first_divergence(plant, steps, expected, inputs, monkeypatch):
    plant(monkeypatch)
    # Wide projections: a fan ratio other than one is what the optimizer's bug leaves out.
    model = dataclasses.replace(SMALL, hidden_size=20) if steps else SMALL
    found = report("float32", model=model, steps=steps)
    divergence = found.first_divergence
    assert found.exit_code == 1 and divergence.side == "jax"
    assert divergence.row.name == expected and inputs <= set(divergence.row.inputs)
    text = found.verdict()
    assert expected in text and "operation: " in text and "worst at (" in text
    assert all(f"from {name}: error" in text for name in inputs)


def test_a_report_is_written_whole(everything, tmp_path):
    found = everything
    paths = found.write(tmp_path / "out")
    pictures = {f"{kind}-{dtype}.png" for kind in ("depth", "step") for dtype in PRECISIONS}
    assert {path.name for path in paths} == {"report.json", "report.html"} | pictures
    values = json.loads(
        (tmp_path / "out" / "report.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name)
    )
    assert values["equal"] and values["first_divergence"] is None and len(values["rows"]) == len(found.rows)
    assert values["contracts"]["jax float32"]["matmul"] == "float32" and values["commit"]
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < LIMIT
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(pictures) and "http" not in page.replace("http-equiv", "")
    assert all(row.name in page for row in found.rows)


def made_up() -> Report:
    """Three tensors of two sides: exact, within, and far beyond in one side alone; names that HTML must escape."""
    limits = {"jax": 1e-15, "torch": 1e-15}
    rows = [
        Row("float64", "forward a<b>", (2, 3), {"jax": 0.0, "torch": 0.0}, limits),
        Row("float64", "forward b", (), {"jax": 1.5e-2, "torch": 4e-16}, limits, details={"jax": "worst at (0,)"}),
        Row("float64", "backward c", (5,), {"torch": 5e-16}, limits, inputs=("forward b",)),
    ]
    return Report("a & b", rows, notes=["<script>"], settings={"eps": 1e-6})


class Page(html.parser.HTMLParser):
    """The rows of a page's tables, as (class, cells), and its tags in order, each closed where it must be."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows, self.tags, self.open = [], [""], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice"
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append((dict(attributes).get("class", ""), []))
        elif tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][1][-1] += data


def test_the_page_says_the_verdict_first_and_marks_what_fails():
    found = made_up()
    text = found.to_html()
    page = Page(text)
    assert text.count('class="verdict beyond"') == 1 and "script" not in page.tags and "b" not in page.tags
    order = [
        text.index(part) for part in ("<h1>", "✗", ">Divergence<", found.about["date"], "numpy ", "<table", "<img")
    ]
    assert order == sorted(order)
    failing = [cells for kind, cells in page.rows if kind == "beyond"]
    assert all((cells[0] == "✗") == (kind == "beyond") for kind, cells in page.rows)
    # Of the worst, of the summary (dtype, phase, side), and of the tensors.
    worst, summary, tensor = failing
    assert worst[1:] == ["float64", "jax", "forward b", "1.50e-02", "1.00e-15", "1.50e+13"]
    assert summary[1:6] == ["float64", "forward", "jax", "2", "1 beyond"]
    assert tensor[1:4] == ["float64", "forward b", "scalar"] and tensor[-1] == "beyond: jax"
    assert tensor[4:7] == ["1.50e-02", "1.00e-15", "1.50e+13"]
    tensors = [cells for _, cells in page.rows if len(cells) == len(tensor)]
    (exact,) = [cells for cells in tensors if cells[2] == "forward a<b>"]
    assert exact[3] == "2×3" and exact[4] == exact[6] == "0.00e+00" and exact[-1] == ""
    (one_side,) = [cells for cells in tensors if cells[2] == "backward c"]
    assert one_side[4:7] == ["", "", ""] and one_side[9] == "5.00e-01"


@pytest.mark.parametrize(("kind", "sign", "headline"), [("equal", "✓", "Equal"), ("incomplete", "!", "Incomplete")])
def test_what_is_no_divergence_has_a_sign_of_its_own(kind, sign, headline):
    left_out = Coverage(tensors=(2, 3), only_torch=("c",)) if kind == "incomplete" else None
    found = dataclasses.replace(made_up(), rows=[made_up().rows[0]], coverage=left_out)
    page = found.to_html()
    assert f'class="verdict {kind}"' in page and f'<span class="sign">{sign}</span>' in page
    assert f'<span class="headline">{headline}</span>' in page and f"<title>{headline}: a &amp; b</title>" in page


@pytest.fixture(scope="module")
def chromium():
    with browser.started() as driver:
        yield driver


@browser.needs_browser
def test_the_page_as_people_look_at_it(chromium, tmp_path):
    """On a screen, on a phone, in the dark: verdict, date and versions at the top, nothing cut off at the side, what
    fails in another colour, everything to be read."""
    from selenium.webdriver.common.by import By

    many = [dataclasses.replace(row, name=f"{row.name}.{'layers.' * 9}{n}") for n in range(9) for row in made_up().rows]
    many += made_up().rows[1:]
    note = f"outputs only in torch, not compared: {'unbroken.' * 30}"
    made = dataclasses.replace(made_up(), rows=many, notes=[note], title=f"{'long_name.' * 9} against torch")
    (tmp_path / "page.html").write_text(made.to_html(), encoding="utf-8")
    for width, height, scheme in ((1280, 800, "light"), (390, 844, "light"), (1280, 800, "dark")):
        browser.window(chromium, width, height, scheme=scheme)
        chromium.get((tmp_path / "page.html").as_uri())
        browser.picture(chromium, f"report-{width}-{scheme}.png")
        content, shown = browser.size_of_page(chromium)
        assert content <= shown <= width, "the page itself scrolls to the side"

        def seen(css):
            return chromium.find_elements(By.CSS_SELECTOR, css)

        assert seen(".verdict")[0].rect["y"] + seen(".verdict")[0].rect["height"] < height
        if width > 500:
            assert seen(".about")[0].rect["y"] + seen(".about")[0].rect["height"] < height / 2
        fine, failing = seen("table.tensors tbody tr:not(.beyond)")[0], seen("table.tensors tr.beyond")[0]
        behind = [row.value_of_css_property("background-color") for row in (fine, failing)]
        assert behind[0] != behind[1]
        texts = [*seen(".headline, .verdict pre, .about, .beyond .word")[:4], *failing.find_elements(By.TAG_NAME, "td")]
        for element in [*texts, *fine.find_elements(By.TAG_NAME, "td")]:
            assert browser.contrast(chromium, element) >= browser.READABLE, (scheme, element.get_attribute("outerHTML"))
        for table in seen(".scroll"):
            assert table.rect["x"] >= 0 and table.rect["x"] + table.rect["width"] <= width
        assert all(image.get_property("naturalWidth") > 0 for image in seen("img"))
        assert all(image.rect["width"] >= min(width, 390) for image in seen("img"))
    requests = chromium.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(name.startswith("data:") for name in requests)


def test_an_equal_page_has_no_row_marked():
    found = made_up()
    page = dataclasses.replace(found, rows=[found.rows[0], found.rows[2]]).to_html()
    assert 'class="verdict equal"' in page and ">Equal<" in page and 'tr class="beyond"' not in page


def test_the_columns_of_the_table_hold_whatever_the_ratio():
    header, *lines = made_up().table().splitlines()
    where = header.index("where")
    assert [line[where:] for line in lines] == ["forward b", "forward b", "backward c"]
    assert "1.50e+13" in lines[0] and [line[:where].split()[-1] for line in lines] == ["1", "0", "0"]


def drawn(monkeypatch, rows: list[Row]):
    """The figure of error against depth."""
    monkeypatch.setattr(report_module, "_png", lambda figure: figure)
    return report_module._depth_picture("trial", "float64", rows)


def test_the_picture_shows_exact_and_infinite_errors_and_names_its_marks(monkeypatch):
    rows = made_up().rows
    rows.append(Row("float64", "forward d", (1,), {"jax": np.inf}, {"jax": 1e-15}))
    figure = drawn(monkeypatch, rows)
    marks = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(marks[EXACT].get_xdata()) == [0] and list(marks[INFINITE].get_xdata()) == [2]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    for name in ("jax: error", "jax: allowance (dotted)", "x: beyond its allowance", EXACT, INFINITE):
        assert name in names
    assert not figure.axes[0].texts


def test_the_picture_is_small_and_keeps_its_colours():
    figure = Figure(figsize=(9, 3))
    axes = figure.add_subplot()
    colours = [*sorted({to_hex(COLOURS[side]) for side in COLOURS}), "#ff0000"]
    for index, colour in enumerate(colours):
        axes.plot([index], [index], color=colour, marker="x" if colour == "#ff0000" else ".")
    plain = io.BytesIO()
    figure.savefig(plain, format="png")
    made = report_module._png(figure)
    kept = {to_hex([c / 255 for c in colour]) for _, colour in Image.open(io.BytesIO(made)).convert("RGB").getcolors()}
    assert kept >= set(colours) and 2 * len(made) < len(plain.getvalue())


def test_long_names_are_cut_at_their_beginning_below_a_picture():
    rows = [dataclasses.replace(made_up().rows[0], name=f"forward {'layers.' * 9}{name}") for name in ("norm", "out")]
    ticks = report_module._ticks([*rows, made_up().rows[1]])
    assert ticks[0].startswith("…") and ticks[0].endswith("layers.norm") and ticks[2] == "b"
    assert max(map(len, ticks.values())) == report_module.LONGEST_TICK


def test_a_panel_without_a_line_says_why(monkeypatch):
    row = Row("float64", "weight a", (2,), {"jax": 0.0}, {"jax": 0.0})
    (axes,) = drawn(monkeypatch, [row]).axes
    assert "logarithmic axis" in axes.texts[0].get_text() and not axes.get_yticks().size
    assert list({line.get_label(): line for line in axes.lines}[EXACT].get_xdata()) == [0]


def test_a_row_before_is_not_called_an_input():
    divergence = compare(chain, lambda dtype: chain(dtype, wrong=True)).verdict()
    assert "the tensor compared just before this one, a: error" in divergence and "from a" not in divergence


@pytest.mark.parametrize("name", MUST_AGREE)
def test_contracts_that_differ_are_refused(name):
    ours = process_contract("jax", "jax", FLOAT32)
    theirs = process_contract("torch", "torch", FLOAT32)
    require_same(ours, theirs)
    with pytest.raises(UserError, match=f"{name} is .* in jax, other in torch") as caught:
        require_same(ours, dataclasses.replace(theirs, **{name: "other"}))
    assert "\n" not in str(caught.value)
    require_same(ours, dataclasses.replace(theirs, **{name: "-"}))


def test_the_contract_reads_the_settings_of_the_process():
    with jax.default_matmul_precision("bfloat16"):
        assert process_contract("jax", "jax", FLOAT32).matmul == "TF32"
    with pytest.raises(UserError, match="jax_enable_x64 is off"):
        process_contract("jax", "jax", PRECISIONS["float64"])


def chain(dtype: str, *, wrong: bool = False) -> dict[str, np.ndarray]:
    """Three arrays, each computed from the one before; `wrong` doubles the second."""
    with jax.enable_x64(dtype == "float64"):
        a = jnp.asarray(np.linspace(0.1, 2.0, 50), dtype)
        b = jnp.tanh(a) * (2 if wrong else 1)
        return {name: np.asarray(x, np.float64) for name, x in {"a": a, "b": b, "c": b @ b}.items()}


def test_two_functions_are_compared_by_the_references_own_error():
    equal = compare(chain, chain, dtypes=["float64", "float32", "bfloat16"])
    assert equal.exit_code == 0 and len(equal.rows) == 9
    found = compare(chain, lambda dtype: chain(dtype, wrong=True), dtypes=["float64", "float32", "bfloat16"])
    divergence = found.first_divergence
    assert (divergence.row.name, divergence.row.dtype, divergence.side) == ("b", "float64", "candidate")
    assert [row.name for row in divergence.inputs] == ["a"]


def test_names_without_a_partner_are_told():
    def partial(dtype):
        values = chain(dtype)
        return {"a": values["a"], "second": values["b"], "extra": values["c"]}

    found = compare(chain, partial, name_map={"second": "b", "third": "d"})
    assert {row.name for row in found.rows} == {"a", "b"}
    assert found.exit_code == 1 and found.headline == "Incomplete" and found.coverage.tensors == (2, 4)
    for text in (
        "tensors only in the candidate: extra",
        "only in the reference: c",
        "key 'third' is nothing",
        "'d' is",
    ):
        assert text in found.verdict()
    accepted = compare(chain, partial, name_map={"second": "b"}, partial=True)
    assert accepted.exit_code == 0 and "no divergence: 2 of 4 tensors compared" in accepted.verdict()
    with pytest.raises(CompareError, match="no name is common"):
        compare(chain, lambda dtype: {"x": chain(dtype)["a"]})


def test_a_wrong_shape_or_a_nan_is_a_divergence():
    def reshaped(dtype):
        values = chain(dtype)
        return values | {"b": values["b"][:, None]}

    def poisoned(dtype):
        values = chain(dtype)
        return values | {"c": values["c"] * np.nan}

    assert "shape (50, 1) instead of (50,)" in compare(chain, reshaped).verdict()
    assert compare(chain, poisoned).first_divergence.row.name == "c"


def test_a_model_that_is_not_ours(capsys, tmp_path):
    assert example.main(example.ExampleOptions(out=str(tmp_path / "report"))) == 0
    assert "no divergence" in capsys.readouterr().out and (tmp_path / "report" / "report.html").is_file()
    found = example.make_report(eps=1e-5, dtypes=("float64",))
    assert found.exit_code == 1 and found.first_divergence.row.name == "forward layer_norm"
    names = {row.name for row in found.rows}
    assert {"weight DenseReluDense.wo.weight", "backward DenseReluDense.wi", "gradient layer_norm.weight"} <= names


def test_a_weights_folder_is_compared(tmp_path):
    save_folder(tmp_path / "weights", SMALL, random_weights(SMALL))
    options = twins.TwinOptions(
        weights=str(tmp_path / "weights"), dtype=("float32",), sequence_length=9, backward=False
    )
    found = twins.compare_twins(options)
    assert found.exit_code == 0, found.verdict()
    assert {row.name.partition(" ")[0] for row in found.rows} == {"forward"}
    assert all(set(row.errors) == {"jax", "torch", "transformers"} for row in found.rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "tinny"], "tiny"),
        (["--weights", "no/such/folder"], "no/such/folder"),
        (["--sequence_length", "0"], "sequence_length=0"),
        (["--steps", "-1"], "steps=-1"),
        (["--steps", "2", "--backward", "False"], "needs gradients"),
        (["--text", "To be"], "--weights"),
        (["--dtype", "float16"], "float16"),
        (["--sequence_length", "100000"], "max_position_embeddings"),
    ],
)
def test_mistakes_are_one_line(flags, message, capsys):
    from harness import cli

    def run():
        return twins.main(cli.parse(twins.TwinOptions, flags, prog="parity_tests", description=""))

    assert cli.run(run) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_command_line_runs(tmp_path):
    save_folder(tmp_path / "weights", SMALL, random_weights(SMALL))
    command = [sys.executable, "-m", "parity_tests", "--weights", str(tmp_path / "weights"), "--dtype", "float32"]
    command += ["--sequence_length", "5", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "no divergence: all" in done.stdout and (tmp_path / "report" / "report.json").is_file()
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert again.returncode == 2 and "already holds files" in again.stderr
