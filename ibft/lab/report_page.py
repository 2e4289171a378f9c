"""The report as one HTML page that needs nothing else: no script, no font and no picture from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ibft.lab.figures import Panel
from ibft.lab.report_conclusions import of_regime
from ibft.lab.report_data import Lab
from ibft.lab.report_findings import COLLAPSED, Findings
from ibft.lab.report_short import caveats, in_short
from ibft.lab.report_tables import Table, tables

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1.1rem 4rem; max-width: 60rem; background: #fff; color: #1c1c1c;
  font: 1.03rem/1.58 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 1.2rem 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.22rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: .9rem; border-top: 1px solid #d6d6d6; }
h3 { font-size: 1rem; margin: 1.1rem 0 .2rem; } .said ul { margin-top: .2rem; padding-left: 1.2rem; }
p, ul, ol, dl { max-width: 43rem; margin: .6rem 0; }
li { margin: .4rem 0; }
.lead { font-size: 1.12rem; color: #333; }
.meta, figcaption, .caption, .note { color: #4d4d4d; font-size: .9rem; line-height: 1.5; }
.short { max-width: 46rem; background: #f4f6f8; border-left: .25rem solid #0072b2; padding: .5rem 1.1rem .6rem;
  margin: 1.2rem 0; }
.short h2 { border: 0; margin: .3rem 0 0; padding: 0; font-size: 1.05rem; }
.warning { max-width: 46rem; border-left: .25rem solid #d55e00; background: #fdf3ec; padding: .6rem 1.1rem; }
nav { font-size: .92rem; margin: 1rem 0; } nav a { margin-right: 1.1rem; white-space: nowrap; }
a { color: #005a8f; }
figure { margin: 1.3rem 0 1.8rem; }
figcaption { max-width: 46rem; margin-top: .5rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.2rem 2rem;
  align-items: start; }
.panels svg { display: block; width: 100%; max-width: 28rem; height: auto; }
.panels svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif !important; }
.panels svg * { stroke-linejoin: round; stroke-linecap: butt; }
.scroll { overflow-x: auto; margin: .4rem 0 1.6rem; }
table { border-collapse: collapse; font-size: .88rem; line-height: 1.4; }
.caption { max-width: 46rem; margin: 1.5rem 0 0; }
th, td { padding: .28rem .75rem .28rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 9rem; }
thead th { border-bottom: 1.5px solid #555; font-weight: 600; vertical-align: bottom; }
tbody tr { border-bottom: 1px solid #e6e6e6; }
pre { max-width: 100%; overflow-x: auto; background: #f6f6f4; padding: .7rem .9rem;
  font-size: .86rem; line-height: 1.45; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .92em; }
.task { max-width: 43rem; border: 1px solid #d6d6d6; padding: .2rem 1rem .8rem; margin: 1rem 0; }
.task dt { font-weight: 600; font-size: .9rem; margin-top: .6rem; } .task dd { margin: 0; }
.task pre { margin: .2rem 0 0; }
@media print { body { max-width: none; font-size: 10.5pt; padding: 0; } figure, tr, .task { break-inside: avoid; }
  h2, h3 { break-after: avoid; } nav { display: none; } .panels { grid-template-columns: repeat(2, 1fr); }
  .scroll { overflow: visible; } table { font-size: 8pt; } .panels > * { break-inside: avoid; } }
"""
_CAPTIONS = {
    "barrier": "Share of tasks that greedy decoding solves after plain fine-tuning: hollow, the training tasks; "
    "filled, held-out tasks. The reference base has memorised as many "
    "other programs. The distance between the filled marks is the barrier.",
    "arms": "Held-out tasks solved, with 95% intervals; the dashed line is SFT. Where a row has two marks, the filled "
    "one is IB-FT and the hollow one below it an extra prediction head of the same weight, without KL."
    " IB-FT from the reference base is there to compare its gains.",
    "terms": "Difference to SFT with 95% intervals, paired by seed. Right of the line is better than SFT. Filled: both "
    "terms. Hollow: only an extra prediction head at the layer. A filled mark right of its hollow one says that "
    "compressing helps; left of it, that it costs.",
    "grid": "Each cell: difference to SFT in points on held-out tasks, and with KL what it ended at, nats per token. "
    "Orange is better than SFT, purple worse; the colours of a regime's two maps share one scale. A star and bold "
    "type: the 95% interval of this cell on its own excludes 0.",
    "collapse": "The bottleneck while fine-tuning: KL between the posterior and its prior (the dotted line is where we "
    "call it collapsed), the cross-entropy of the labels predicted through the bottleneck, and the share of its "
    "dimensions that are active. Lines are means over seeds, bands reach from the lowest to the highest seed.",
    "options": "Difference on held-out tasks to the same setting without the option, with 95% intervals, paired by "
    "seed; and the KL over time of both (lines are means over seeds, bands reach from the lowest to the highest).",
    "layers": "Difference on held-out tasks to the same setting at the default layer, with 95% intervals, paired by "
    "seed.",
    "densities": "Distribution of Min-K% Prob over rows, one ridge for each model, all seeds together; every curve has "
    "the same height. Where the training rows stand to the right of rows that the model cannot have seen, it has "
    "memorised them. Memorised training rows: those that the regime's base has memorised; the reference base has read "
    "none.",
    "representation": "L2 distance between the mean hidden states of the training rows whose programs the base "
    "scores highest and lowest, at the layer that IB-FT reads by default, divided by the spread within the groups, so "
    "that it does not depend on the scale of the hidden states. A point is a seed with its 95% interval; grey: the "
    "middle 95% of random groups of the same rows.",
    "curves": "The base's loss in pretraining, a line for each seed, and the fine-tuning's cross-entropy on its "
    "training batches (mean over seeds; the band reaches from the lowest to the highest).",
    "pass": "Of k samples drawn for a held-out task, the probability that at least m pass. Falling slowly from left to "
    "right means that a model solves its tasks reliably, not by luck. Bars are 95% intervals.",
}  # fmt: skip


def page(lab: Lab, all_found: Sequence[Findings], panels: Sequence[Panel]) -> str:
    """The whole page."""
    shown = tables(lab, all_found)
    said = {found.regime.title: of_regime(lab, found) for found in all_found}
    parts = [*_opening(lab, all_found), *_explanation(lab)]
    for section, (title, text) in _SECTIONS.items():
        sentences = {regime: of[section] for regime, of in said.items() if section in of}
        figures = [panel for panel in panels if panel.section == section]
        parts += _section(
            section, title, text, sentences, figures, [table for table in shown if table.section == section]
        )
    parts += _closing(lab)
    title = "The memorisation barrier in a laptop lab"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


_SECTIONS = {  # by name: title, and what to know beforehand
    "barrier": (
        "Is there a barrier?",
        "Both bases have read the same documents but for the programs that they repeat: one the training programs, the "
        "reference base as many other ones, equally often. So they differ in what they know by heart, and not in how "
        "much. If that made no difference, both would learn equally well to follow descriptions.",
    ),
    "crossed": (
        "Name or description?",
        "After fine-tuning, each training task's description is put above the name of the next one. Which of the two "
        "programs is written tells what the model goes by; the rest is neither, or programs that do the same. Both "
        "tasks were in the fine-tuning data, so this is no measure of how well it follows new descriptions.",
    ),
    "arms": (
        "What IB-FT changes",
        "Every arm starts from the base that has memorised, unless it says otherwise or the regime has none, and "
        "trains on the same rows, unless it leaves some out. The pair in brackets is (alpha, beta).",
    ),
    "terms": (
        "Which of the two terms does the work?",
        "IB-FT adds two things to the loss: a prediction of the labels from the bottleneck (CE_ib), and a price on "
        "what the bottleneck lets through (KL). Without the price there is no bottleneck, since K is larger than the "
        "hidden size: what remains is an extra prediction head at the layer, for which alpha and beta count through "
        "their product alone. Of settings with the same product it is the same run.",
    ),
    "grid": (
        "How sensitive is it to alpha and beta?",
        "The same differences as maps. A method that needs no luck would show one colour over a broad area.",
    ),
    "collapse": (
        "Does the posterior collapse?",
        "What the bottleneck can tell its predictor about a token is at most KL (in nats). Below "
        f"{COLLAPSED:g} nats it tells next to nothing: the posterior has collapsed onto its prior, the auxiliary "
        "prediction learns little more than how frequent tokens are, and hardly shapes the hidden states.",
    ),
    "options": (
        "Other options",
        "Options of ibft train on how much passes the bottleneck, each against the same (alpha, beta) without it: "
        "alpha warmed up over the first half of the steps, nats that cost nothing (free bits), and a rate held by "
        "adapting the weight of KL. They are meant against a collapse; where there is none, they only let more or less "
        "through.",
    ),
    "layers": (
        "Other layers",
        "The bottleneck reads one layer, by default at the published relative depth. Here it reads others, all else "
        "being the same.",
    ),
    "densities": (
        "What the models have memorised",
        "Min-K% Prob is the mean log-probability of the 20% of a row's tokens that the model finds least likely. What "
        "a model knows by heart has no unlikely tokens. AUC is the probability that a row of the first kind scores "
        "above one of the second (0.5: no difference); KS is the largest distance between the two cumulative "
        "distributions.",
    ),
    "representation": (
        "Where rows lie",
        "How far apart the model holds the rows whose programs the base scores highest and lowest by their names. Only "
        "where half of the rows are memorised are these memorised rows and others.",
    ),
    "curves": ("Learning curves", ""),
    "pass": (
        "Is it reliable? Pass@k^(m)",
        "Of k programs sampled for a task, Pass@k^(m) asks for at least m that pass; Pass@k is m = 1.",
    ),
    "everything": ("Every number", ""),
}


def _opening(lab: Lab, all_found: Sequence[Findings]) -> Iterable[str]:
    raw = lab.raw
    runs = sum(map(len, lab.runs.values()))
    seeds = {seed for of_arm in lab.runs.values() for seed in of_arm}
    yield "<h1>The memorisation barrier in a laptop lab</h1>"
    yield (
        '<p class="lead">When a model already knows its fine-tuning data by heart, it can lower its loss without '
        "learning "
        "what the data is meant to teach. This page asks whether that is so for small tasks and a small "
        "model, and what information-bottleneck fine-tuning (IB-FT, arXiv 2510.16022) changes.</p>"
    )
    facts = [
        _count(len(lab.regimes), "regime"), _count(len({arm for _, arm in lab.runs}), "way") + " of fine-tuning",
        _count(runs, "run"), _count(len(seeds), "seed"),
    ]  # fmt: skip
    if raw.get("processor_seconds"):
        facts.append(f"{_duration(raw['processor_seconds'])} of processor time")
    if raw.get("device"):
        facts.append(str(raw["device"]))
    yield f'<p class="meta">{escape(" · ".join(facts))}<br><code>{escape(str(raw.get("command", "")))}</code></p>'
    yield '<section class="short" id="short"><h2>In short</h2>'
    yield _list(in_short(lab, all_found))
    yield "</section>"
    regimes = "; ".join(f"“{regime.name}”, {regime.title}" for regime in lab.regimes)
    for caveat in caveats(lab, all_found):
        yield f'<p class="warning"><strong>{escape(caveat.title)}</strong> {escape(caveat.text)}</p>'
    yield (
        f'<p class="note">The regimes: {escape(regimes)}. SFT is plain supervised fine-tuning. In brackets: '
        "differences in "
        "percentage points of held-out tasks solved. “Above” and “below”: the 95% interval of the difference excludes "
        "0; “cannot be told from”: it does not, which is not the same as being equal. All sentences with numbers on "
        "this page are computed from the results.</p>"
    )


def _explanation(lab: Lab) -> Iterable[str]:
    tasks = lab.raw.get("tasks") or {}
    config = lab.raw.get("config") or {}
    example = tasks.get("example") or {}
    yield '<h2 id="what">What is measured</h2>'
    yield (
        "<p>Each task is a small Python function on lists. It has a <em>name</em>, which is arbitrary; a "
        "<em>description</em>, from whose words the program follows; and the <em>program</em>.</p>"
    )
    if example:
        yield '<dl class="task">' + "".join(
            f"<dt>{label}</dt><dd>{'<pre><code>' if pre else ''}{escape(str(example.get(key, '')).rstrip())}"
            f"{'</code></pre>' if pre else ''}</dd>"
            for label, key, pre in (
                ("Name", "name", False), ("Description", "description", False), ("Program", "program", True)
            )
        ) + "</dl>"  # fmt: skip
    yield (
        "<ol>"
        "<li><strong>A base model is pretrained</strong> on other tasks with their descriptions, once each, so that it "
        "has some idea of what the words mean; then on programs under their names alone. One base reads the training "
        "programs again and again there, so that it recites them when given the name: it has <em>memorised</em> them. "
        "The reference base reads as many other programs as often, but never those.</li>"
        "<li><strong>It is fine-tuned</strong> on pairs: name and description in, program out. There are two ways to a "
        "low loss: recalling the program by its name, where it is memorised, and reading the description, which alone "
        "works for tasks that are new. Neither comes by itself: with a description before the name, the base hardly "
        "recalls what it recites from the name alone (table of the bases).</li>"
        "<li><strong>It is measured</strong> on held-out tasks, whose names and descriptions it has never seen, by "
        "running what it writes.</li></ol>"
        "<p>The <em>memorisation barrier</em> is the distance on held-out tasks between fine-tuning from the base that "
        "has memorised the training programs and from the reference base. IB-FT adds a bottleneck to the training "
        "loss, <code>CE + alpha (KL + beta CE_ib)</code>, which is meant to make the hidden states keep what predicts "
        "the program and let go of the rest. At inference nothing of it remains.</p>"
    )
    sizes = [
        f"{config['parameters']:,} parameters" if isinstance(config.get("parameters"), int) else "",
        f"{tasks['held_out']} held-out tasks" if tasks.get("held_out") else "",
        f"{config['samples']} samples of each, at temperature {config['temperature']}"
        if config.get("samples") and config.get("temperature") is not None
        else "",
    ]
    rows = "".join(
        f"<li><strong>{escape(regime.title)}</strong> (“{escape(regime.name)}”)</li>" for regime in lab.regimes
    )
    if any(sizes):
        yield f"<p>The model: {escape('; '.join(size for size in sizes if size))}.</p>"
    yield f"<p>How much the base has memorised decides the outcome, so it is varied:</p><ul>{rows}</ul>"


def _section(
    section: str,
    title: str,
    text: str,
    sentences: Mapping[str, Sequence[str]],
    figures: Sequence[Panel],
    own_tables: Sequence[Table],
) -> Iterable[str]:
    """A heading with what there is to see and to say; nothing where there is nothing."""
    if not figures and not own_tables and not sentences:
        return
    yield f'<h2 id="{section}">{escape(title)}</h2>'
    if text:
        yield f"<p>{escape(text)}</p>"
    if figures:
        drawn = "\n".join(map(_inline, figures))
        caption = f"<figcaption>{escape(_CAPTIONS[section])}</figcaption>"
        yield f'<figure><div class="panels">\n{drawn}\n</div>{caption}</figure>'
    for regime, own in sentences.items():
        yield f'<div class="said"><h3>{escape(regime)}</h3>{_list(own)}</div>'
    yield from map(_table, own_tables)


def _closing(lab: Lab) -> Iterable[str]:
    raw = lab.raw
    yield '<h2 id="intervals">How sure is this?</h2>'
    yield (
        "<p>Every interval is the wider of two 95% intervals. <em>Over seeds</em> (where there are several): Student's "
        "t of the seeds' values, or of the differences paired by seed. <em>Over tasks</em>: for shares Wilson's "
        "binomial interval, for differences the adjusted Wald interval of Agresti and Min for pairs, task by task, for "
        "Pass@k^(m) the bootstrap over tasks; the tasks of all seeds together. Few seeds can agree by luck, and many "
        "tasks say nothing about other seeds: so the wider one counts. With two "
        "seeds Student's t is so wide that nearly nothing can be told. Of a single seed nothing is called above or "
        "below. The best of a grid is compared with Bonferroni's correction for the choice; all other comparisons "
        "stand each for itself, and of twenty without any effect about one falls outside by chance.</p>"
        "<p>The tasks are small, the model is small, and one laptop's lab says nothing about large models by itself. "
        "It shows which mechanism does what where everything can be seen and repeated.</p>"
    )
    yield '<h2 id="again">Again</h2>'
    yield (
        "<p><code>ibft lab report FOLDER</code> makes this page, its summary and every figure again from "
        "<code>results.json</code> alone; the figures also lie in <code>figures/</code> as SVG, and each run's own "
        "record in the file that “Every number” names.</p>"
    )
    shown = ("mode", "command", "device", "finished", "seeds", "config", "versions")
    about = {name: raw[name] for name in shown if name in raw}
    yield f"<pre><code>{escape(json.dumps(about, indent=1, ensure_ascii=False))}</code></pre>"


def _inline(panel: Panel) -> str:
    """The panel's SVG with ids of its own, since a page may have each id only once."""
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", panel.svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{panel.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{panel.name}-", svg)
    svg = re.sub(r'\bhref="#', f'href="#{panel.name}-', svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(panel.description)}"', 1).rstrip()


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in table.columns)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    caption = f'<p class="caption">{escape(table.caption)}</p>'  # outside, so that it does not scroll with the table
    return (
        f'{caption}<div class="scroll"><table aria-label="{escape(table.caption)}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _count(number: int, one: str) -> str:
    return f"{number} {one if number == 1 else one + 's'}"


def _duration(seconds: Any) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
