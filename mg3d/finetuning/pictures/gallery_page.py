"""The page of `mg3d.finetuning.report_gallery`: template, style and script; texts are escaped, nothing is fetched.

The page allows one script by its digest, so that none in a report could run even if it were not escaped.
"""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #57606a; --paper: #ffffff; --line: #d0d7de; --band: #f6f8fa;
  --accent: #0b66a8; --good: #116329; --good-band: #d7f3dc; --miss: #7d4e00; --miss-band: #fdeebf; --bad: #a4161a;
  --bad-band: #fbdedd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa4ae; --paper: #0f1419; --line: #3d444d;
  --band: #171d24; --accent: #6cb6f0; --good: #7ee2a0; --good-band: #12351f; --miss: #f2cc60; --miss-band: #3d2f08;
  --bad: #ffa8a1; --bad-band: #4a1a1c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.2rem 1.5rem 4rem; font: 16px/1.55 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0; overflow-wrap: anywhere; }
h3 { font-size: .85rem; margin: 0 0 .25rem; color: var(--quiet); font-weight: 600; }
.quiet { color: var(--quiet); }
p { margin: .2rem 0; max-width: 110ch; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.tools { position: sticky; top: 0; z-index: 3; display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; align-items: center;
  margin: .8rem 0; padding: .55rem 0; background: var(--paper); border-bottom: 1px solid var(--line); }
.tools[hidden] { display: none; }
.tools label { display: inline-flex; gap: .4rem; align-items: center; }
button, select, input[type="number"] { font: inherit; color: var(--ink); background: var(--band); padding: .15rem .6rem;
  border: 1px solid var(--line); border-radius: 6px; }
input[type="number"] { width: 4.6rem; }
button { cursor: pointer; }
button[aria-pressed="true"] { background: var(--accent); border-color: var(--accent); color: var(--paper); }
article { scroll-margin-top: 4rem; margin: 1.2rem 0; padding: 1rem 1.1rem; border: 1px solid var(--line);
  border-radius: 10px; }
article[hidden] { display: none; }
.head { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: baseline; margin-bottom: .6rem; }
.group { padding: 0 .55rem; border: 1px solid var(--line); border-radius: 9px; background: var(--band);
  font-size: .85rem; }
.scores { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0 0 0 auto; padding: 0; list-style: none;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.body { display: grid; grid-template-columns: minmax(0, 11fr) minmax(0, 9fr); gap: 1.2rem; }
.body.bare { grid-template-columns: minmax(0, 1fr); }
.panes { display: flex; gap: .7rem; align-items: start; }
.pane { flex: var(--wide) 1 0; min-width: 0; margin: 0; }
.screen { position: relative; overflow: hidden; width: 100%; background: #000; clip-path: inset(.5px 0); }
.screen img { position: absolute; top: 0; left: 0; width: 100%; height: calc(100% * var(--frames));
  transform: translateY(calc(-100% * var(--frame) / var(--frames))); }
.letter { position: absolute; padding: 0 .25rem; border-radius: 3px; background: rgb(0 0 0 / 65%); color: #fff;
  font-size: .8rem; line-height: 1.3; }
.letter.top { top: 3px; left: 50%; transform: translateX(-50%); }
.letter.bottom { bottom: 3px; left: 50%; transform: translateX(-50%); }
.letter.left { left: 3px; top: 50%; transform: translateY(-50%); }
.letter.right { right: 3px; top: 50%; transform: translateY(-50%); }
.pane figcaption { font-size: .82rem; color: var(--quiet); }
.pane input { display: block; width: 100%; margin: .25rem 0 0; accent-color: var(--accent); }
.texts { grid-column: 1 / -1; display: grid; grid-template-columns: 1fr 1fr; gap: .8rem 1.8rem; align-content: start; }
.texts p, details p { margin: 0; max-width: 75ch; overflow-wrap: anywhere; white-space: pre-line; }
.none { color: var(--quiet); font-style: italic; }
mark { color: inherit; background: none; border-radius: 3px; padding: .05rem .15rem; box-decoration-break: clone;
  -webkit-box-decoration-break: clone; text-underline-offset: .2em; }
mark.matched { background: var(--good-band); text-decoration: underline solid var(--good) 1px; }
mark.missed { background: var(--miss-band); text-decoration: underline dashed var(--miss) 2px; }
mark.invented { background: var(--bad-band); text-decoration: underline wavy var(--bad) 1px; }
.tag { display: inline-block; margin-left: .3rem; padding: 0 .35rem; border: 1px solid; border-radius: 8px;
  font-size: .72rem; line-height: 1.45; white-space: nowrap; background: var(--paper); }
.matched.chip, .matched.tag { color: var(--good); } .missed.chip, .missed.tag { color: var(--miss); }
.invented.chip, .invented.tag { color: var(--bad); }
.chips { margin: 0; display: grid; gap: .5rem; align-content: start; }
.chips div { display: flex; flex-wrap: wrap; gap: .3rem; align-items: baseline; }
.chips dt { width: 100%; font-size: .85rem; color: var(--quiet); }
.chips dd { margin: 0; }
.chip { padding: 0 .6rem; border: 1px solid; border-radius: 10px; font-size: .85rem; line-height: 1.5; }
.matched.chip { background: var(--good-band); } .missed.chip { background: var(--miss-band); border-style: dashed; }
.invented.chip { background: var(--bad-band); }
details { grid-column: 1 / -1; } summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
footer { margin-top: 2rem; color: var(--quiet); font-size: .85rem; }
.bare .chips { grid-template-columns: repeat(3, 1fr); }
@media (max-width: 60rem) { .body, .texts { grid-template-columns: minmax(0, 1fr); } .scores { margin-left: 0; } }
@media print { .tools { display: none; } article { break-inside: avoid; } }
"""

SCRIPT = """
"use strict";
{
  const tools = document.querySelector(".tools");
  const list = document.querySelector("main");
  const cases = [...list.querySelectorAll("article")];
  const [most, order, output] = ["input", "select", "output"].map((name) => tools.querySelector(name));
  let group = "";
  const apply = () => {
    const sign = { low: 1, high: -1 }[order.value] ?? 0;
    const ranked = [...cases].sort((one, two) => sign * (one.dataset.score - two.dataset.score));
    let shown = 0;
    for (const entry of ranked) {
      const fits = (!group || entry.dataset.group === group) && shown < Number(most.value);
      entry.hidden = !fits;
      shown += fits;
      list.append(entry);
    }
    output.textContent = `${shown} of ${cases.length} on this page`;
  };
  for (const button of tools.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      group = button.dataset.group;
      for (const other of tools.querySelectorAll("button")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      apply();
    });
  }
  most.addEventListener("input", apply);
  order.addEventListener("input", apply);
  for (const pane of list.querySelectorAll(".pane")) {
    const [slider, screen, place] = ["input", ".screen", "output"].map((name) => pane.querySelector(name));
    const positions = pane.dataset.positions.split(" ");
    slider.addEventListener("input", () => {
      screen.style.setProperty("--frame", slider.value);
      place.textContent = `${Number(positions[slider.value]) + 1} of ${pane.dataset.size}`;
    });
  }
  tools.hidden = false;
  apply();
}
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<meta name="robots" content="noindex">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'; script-src 'sha256-{{ digest }}'">
<title>{{ title }}</title>
<style>{{ style|safe }}</style>
</head>
{% set signs = {"matched": "\u2713", "missed": "\u2212", "invented": "+"} %}
{% set meanings = {"matched": "named in both", "missed": "in the reference only", "invented": "generated only"} %}
{% macro marked_text(pieces) %}{% for piece in pieces %}{% if piece.status %}<mark class="{{ piece.status }}">
{{- piece.text }}</mark>
{%- for name, status in piece.findings %}<span class="tag {{ status }}" title="{{ name }}: {{ meanings[status] }}">
{{- signs[status] }} {{ name }}</span>{% endfor %}{% else %}{{ piece.text }}{% endif %}{% endfor %}{% endmacro %}
<body>
<header>
<h1>{{ title }}</h1>
<p class="quiet">{% for fact in facts %}{{ fact }} &middot; {% endfor %}{{ cases|length }} of {{ total }} cases on this
page, chosen by {{ order_by }} &middot; {{ size }}, no network</p>
{% if marked %}<p>A sentence that states a finding is marked:
{% for status in ("matched", "missed", "invented") %}<mark class="{{ status }}">{{ signs[status] }} {{ status }}</mark>
({{ meanings[status] }}){{ "." if loop.last else ", " }}{% endfor %}</p>
{% else %}<p class="none">No reader of findings was given, so none is marked.</p>{% endif %}
</header>
<div class="tools" role="toolbar" aria-label="which cases are shown" hidden>
<span><button type="button" data-group="" aria-pressed="true">all</button>
{% for name in groups %}<button type="button" data-group="{{ name }}" aria-pressed="false">{{ name }}</button>
{% endfor %}</span>
<label>at most <input type="number" min="1" max="{{ cases|length }}" value="{{ cases|length }}"></label>
<label>order <select><option value="">as chosen</option><option value="low">lowest {{ order_by }} first</option>
<option value="high">highest {{ order_by }} first</option></select></label>
<output class="quiet" aria-live="polite"></output>
</div>
<main>
{% for case in cases %}<article data-group="{{ case.group }}" data-score="{{ case.rank }}"
aria-label="case {{ case.id }}">
<div class="head"><h2>{{ case.id }}</h2><span class="group">{{ case.group }}</span>
<ul class="scores">{% for name, value in case.scores %}<li>{{ name }} <b>{{ value }}</b></li>{% endfor %}</ul></div>
<div class="body{{ "" if case.panes else " bare" }}">
{% if case.panes %}<div class="panes">{% for pane in case.panes %}{% set start = pane.positions|length // 2 %}
<figure class="pane" style="--wide: {{ pane.width / pane.height }}"
data-positions="{{ pane.positions|join(" ") }}" data-size="{{ pane.size }}">
<div class="screen" style="aspect-ratio: {{ pane.width }} / {{ pane.height }};
--frames: {{ pane.positions|length }}; --frame: {{ start }}">
<img alt="{{ pane.plane.name }} slices of case {{ case.id }}" src="{{ pane.uri }}">
{% for place in ("top", "right", "bottom", "left") %}
<b class="letter {{ place }}">{{ pane.plane.letters[loop.index0] }}</b>
{% endfor %}</div>
<figcaption>{{ pane.plane.name }} <output>{{ pane.positions[start] + 1 }} of {{ pane.size }}</output></figcaption>
{% if pane.positions|length > 1 %}
<input type="range" min="0" max="{{ pane.positions|length - 1 }}" value="{{ start }}"
aria-label="{{ pane.plane.name }} slice of case {{ case.id }}">{% endif %}
</figure>{% endfor %}</div>{% endif %}
{% if marked %}<dl class="chips">{% for status, names in case.chips %}
<div><dt>{{ status }}, {{ meanings[status] }}</dt>
{% for name in names %}<dd class="chip {{ status }}">{{ signs[status] }} {{ name }}</dd>{% else %}
<dd class="none">none</dd>
{% endfor %}</div>{% endfor %}</dl>{% endif %}
<div class="texts">
<section><h3>Reference</h3><p>{{ marked_text(case.reference) }}</p></section>
<section><h3>Generated</h3>{% if case.hypothesis %}<p>{{ marked_text(case.hypothesis) }}</p>
{% else %}<p class="none">empty</p>{% endif %}</section>
{% for title, pieces in case.others %}<details><summary>{{ title }}</summary><p>{{ marked_text(pieces) }}</p></details>
{% endfor %}</div>
</div>
</article>
{% endfor %}
</main>
<footer>Scans and reports stay under the licence of their data set. For research, not for diagnosis.</footer>
<script>{{ script|safe }}</script>
</body>
</html>
"""
