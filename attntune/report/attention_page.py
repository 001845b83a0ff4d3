"""The HTML template of attention maps; rendered by ``attention_maps.py``."""

from __future__ import annotations

#: Jinja2, autoescaped; ``data`` is JSON.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 1.5rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { color: #555; margin: .3rem 0; }
.tokens span { display: inline-block; padding: .1rem .3rem; margin: .1rem; border-radius: 3px; cursor: pointer; }
.tokens span.selected { outline: 2px solid #D55E00; }
.tokens b { font-weight: 600; color: #555; margin-right: .4rem; }
.panels { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; margin-top: .8rem; }
.grid { display: grid; gap: 3px; align-items: center; font-size: 11px; color: #555; }
.grid canvas { width: 44px; height: 44px; cursor: pointer; border: 1px solid #ddd; image-rendering: pixelated; }
.grid canvas.selected { outline: 2px solid #D55E00; }
table { border-collapse: collapse; font-size: 11px; }
td { width: 18px; height: 18px; padding: 0; }
th { font-weight: 400; padding: 0 .3rem; text-align: right; white-space: nowrap; cursor: pointer; }
th.selected { color: #D55E00; font-weight: 600; }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: .3rem 0; cursor: default; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>Choose a head in the grid, or the mean of all; choose a token to see what it attends to. Darker is more, up to the
largest weight of a token that is not special.</p>
{% for section in sections %}
<section id="map-{{ loop.index0 }}">
<h2>{{ section.name }}: {{ section.layers }} layers of {{ section.heads }} heads</h2>
<div class="tokens queries"><b>from</b>
{% for token in section['queries'] %}
<span data-at="{{ loop.index0 }}">{{ token }}</span>
{% endfor %}
</div>
<div class="tokens keys"><b>to</b>
{% for token in section['keys'] %}
<span data-at="{{ loop.index0 }}">{{ token }}</span>
{% endfor %}
</div>
<p class="choice"></p>
<div class="panels"><div class="grid"></div><table></table></div>
</section>
{% endfor %}
<script>
"use strict";
const maps = {{ data|safe }};
const shade = (weight, top) => `rgba(0, 114, 178, ${top ? Math.min(weight / top, 1) : 0})`;
const element = (name, text) => { const made = document.createElement(name); made.textContent = text; return made; };
maps.forEach((map, number) => {
  const section = document.getElementById(`map-${number}`);
  const bytes = Uint8Array.from(atob(map.weights), (c) => c.charCodeAt(0));
  const rows = map.queries.length, columns = map.keys.length, area = rows * columns;
  const all = new Float32Array(area);
  const heads = [];
  for (let h = 0; h < map.layers * map.heads; h++) {
    heads.push(Float32Array.from(bytes.subarray(h * area, (h + 1) * area), (value) => value / 255));
    heads[h].forEach((value, i) => { all[i] += value / (map.layers * map.heads); });
  }
  let chosen = -1, query = map.selected;
  const weights = () => (chosen < 0 ? all : heads[chosen]);
  const name = (h) => (h < 0 ? "mean of all heads" : `layer ${Math.floor(h / map.heads)}, head ${h % map.heads}`);
  const grid = section.querySelector(".grid"), table = section.querySelector("table");
  const canvases = [];
  const canvas = (h) => {
    const made = document.createElement("canvas");
    made.width = columns; made.height = rows; made.title = name(h);
    const context = made.getContext("2d"), values = h < 0 ? all : heads[h], top = Math.max(...values);
    values.forEach((value, i) => {
      context.fillStyle = shade(value, top);
      context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
    });
    made.onclick = () => { chosen = h; show(); };
    canvases.push([h, made]);
    return made;
  };
  grid.style.gridTemplateColumns = `auto repeat(${map.heads}, 46px)`;
  grid.append(element("span", "mean"), canvas(-1));
  for (let h = 1; h < map.heads; h++) grid.append(element("span", ""));
  for (let h = 0; h < map.layers * map.heads; h++) {
    if (h % map.heads === 0) grid.append(element("span", `layer ${h / map.heads}`));
    grid.append(canvas(h));
  }
  const head = table.createTHead().insertRow();
  head.append(element("th", ""));
  map.keys.forEach((token) => head.append(element("th", token)));
  const body = table.createTBody(), cells = [], labels = [];
  map.queries.forEach((token, i) => {
    const row = body.insertRow();
    labels.push(element("th", token));
    labels[i].onclick = () => { query = i; show(); };
    row.append(labels[i]);
    for (let j = 0; j < columns; j++) cells.push(row.insertCell());
  });
  const froms = section.querySelectorAll(".queries span"), tos = section.querySelectorAll(".keys span");
  froms.forEach((span, i) => { span.onclick = () => { query = i; show(); }; });
  const most = (values) => {
    const plain = values.filter((_, i) => !map.special[i % columns]);
    return Math.max(...(plain.length ? plain : values));
  };
  function show() {
    const values = weights(), top = most(values);
    cells.forEach((cell, i) => {
      cell.style.background = shade(values[i], top);
      cell.title = `${map.queries[Math.floor(i / columns)]} → ${map.keys[i % columns]}: ${values[i].toFixed(3)}`;
    });
    const row = values.subarray(query * columns, (query + 1) * columns), darkest = most(row);
    tos.forEach((span, j) => { span.style.background = shade(row[j], darkest); span.title = row[j].toFixed(3); });
    froms.forEach((span, i) => span.classList.toggle("selected", i === query));
    labels.forEach((label, i) => label.classList.toggle("selected", i === query));
    canvases.forEach(([h, made]) => made.classList.toggle("selected", h === chosen));
    section.querySelector(".choice").textContent = name(chosen);
  }
  show();
});
</script>
</body>
</html>
"""
