"""The page of a run as a template; every value is escaped, nothing is fetched from anywhere."""

from __future__ import annotations

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #57606a; --paper: #ffffff; --line: #d0d7de; --band: #f6f8fa;
  --warn: #fff8c5; --warn-line: #d4a72c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9198a1; --paper: #0d1117; --line: #3d444d;
  --band: #161b22; --warn: #3a2f0b; --warn-line: #9e7b1c; } }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p.quiet, figcaption { color: var(--quiet); margin: .2rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--band); }
td.interval, td small { color: var(--quiet); }
ul.notes { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .6rem 1rem .6rem 2rem; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); }
details { margin: .6rem 0; }
summary { cursor: pointer; }
pre { background: var(--band); padding: .8rem; overflow-x: auto; font-size: 13px; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="quiet">{% for fact in facts %}{{ fact }}{% if not loop.last %} &middot; {% endif %}{% endfor %}</p>
{% if notes %}<ul class="notes">{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>{% endif %}
{% for table in tables %}{% if loop.first %}<h2>Results</h2>{% endif %}
{% if table.name %}<details><summary>{{ table.name }}: {{ table.rows|length }} rows</summary>{% endif %}
<div class="wide"><table>
<thead><tr><th>metric</th><th>mean</th><th>95 % interval</th><th>n</th>{% for name in classes %}<th>{{ name }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr><td>{{ row.name }}</td><td>{{ row.mean }}</td>
<td class="interval">{{ row.interval }}</td><td>{{ row.n }}</td>
{% for value in row.classes %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% if table.name %}</details>{% endif %}
{% if loop.last %}<p class="quiet">Intervals are bootstrap intervals over patients. A dash is a value that is not
defined; n counts the cases where it is.</p>{% endif %}
{% endfor %}
{% if beside.rows %}<h2>Beside the generator</h2>
<div class="wide"><table><thead><tr><th>metric</th>{% for name in beside.columns %}<th>{{ name }}</th>{% endfor %}</tr>
</thead><tbody>
{% for name, cells in beside.rows %}<tr><td>{{ name }}</td>{% for mean, interval in cells %}<td>{{ mean }}
<small>{{ interval }}</small></td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="quiet">Label-to-report writes what a classifier finds, in sentences of training reports; the constant report
says the same of every case. A generator that is not better than both has learned style, not findings.</p>{% endif %}
{% for name, text in definitions.items() %}{% if loop.first %}<details><summary>What the numbers mean</summary><dl>
{% endif %}<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% if loop.last %}</dl></details>{% endif %}{% endfor %}
{% for figure in figures %}{% if loop.first %}<h2>Pictures</h2>{% endif %}
<figure><figcaption>{{ figure.caption }}</figcaption>
<img alt="{{ figure.caption }}" src="data:image/png;base64,{{ figure.data }}"></figure>
{% endfor %}
{% if rows %}
<h2>Cases</h2>
{% if hidden %}<p class="quiet">The first {{ rows|length }} rows; {{ hidden }} more are in per_case.csv.</p>{% endif %}
<details{% if rows|length <= 30 %} open{% endif %}><summary>{{ rows|length }} rows</summary>
<div class="wide"><table><thead><tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in rows %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div></details>
{% endif %}
{% for part in parts %}{% if loop.first %}<h2>How it was made</h2>{% endif %}
<details><summary>{{ part.name }}</summary><pre>{{ part.text }}</pre></details>
{% endfor %}
</body>
</html>
"""
