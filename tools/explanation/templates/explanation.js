"use strict";

// maps over the viewer: painted on one canvas per plane from the numbers of the chosen sentence
{
  const data = JSON.parse(document.getElementById("maps").textContent);
  const [deep, high, wide] = data.grid;
  const cells = deep * high * wide;
  const contrasts = data.contrasts.map((contrast) => {
    const bytes = Uint8Array.from(atob(contrast.values), (letter) => letter.charCodeAt(0));
    return { ...contrast, values: new Float32Array(bytes.buffer) };
  });
  const stage = document.querySelector(".viewer");
  const figures = [...stage.querySelectorAll(".pane")].map((figure) => ({
    figure,
    plane: data.planes[figure.dataset.plane],
    slider: figure.querySelector("input"),
    canvas: figure.querySelector(".heat"),
    positions: JSON.parse(figure.dataset.positions),
    size: Number(figure.dataset.size),
    step: Number(figure.dataset.step),
  }));
  const [blocks, own, opacity] = [".cells", ".own", ".opacity"].map((name) => stage.querySelector(name));
  const chosen = { sentence: 0, contrast: 1 };

  // value at shares (z, y, x) of the volume: trilinear between cell centres, or that of the cell
  const corners = (share, size) => {
    const place = Math.min(Math.max(share * size - 0.5, 0), size - 1);
    if (blocks.checked) {
      const cell = Math.min(Math.floor(share * size), size - 1);
      return [cell, cell, 0];
    }
    const low = Math.floor(place);
    return [low, Math.min(low + 1, size - 1), place - low];
  };
  const valueAt = (values, first, [z, y, x]) => {
    const [z0, z1, tz] = corners(z, deep);
    const [y0, y1, ty] = corners(y, high);
    const [x0, x1, tx] = corners(x, wide);
    const row = (k, j) => {
      const start = first + (k * high + j) * wide;
      return values[start + x0] * (1 - tx) + values[start + x1] * tx;
    };
    const sheet = (k) => row(k, y0) * (1 - ty) + row(k, y1) * ty;
    return sheet(z0) * (1 - tz) + sheet(z1) * tz;
  };
  const limits = (contrast) => {
    if (!own.checked) return [contrast.low, contrast.high];
    const values = contrast.values.subarray(chosen.sentence * cells, (chosen.sentence + 1) * cells);
    const [low, top] = [Math.min(...values), Math.max(...values)];
    const limit = Math.max(Math.abs(low), Math.abs(top), 1e-6);
    return contrast.signed ? [-limit, limit] : [low, Math.max(top, low + 1e-6)];
  };
  const where = () => {
    const shares = [0, 0, 0];
    for (const { plane, slider, positions, size } of figures) {
      shares[plane.axis] = (positions[Number(slider.value)] + 0.5) / size;
    }
    return shares;
  };
  const words = (value, [low, top], signed) => {
    const span = top - low;
    const digits = span >= 0.1 ? 2 : span >= 0.01 ? 3 : span >= 0.001 ? 4 : 5;
    const text = Math.abs(value).toFixed(digits);
    if (!signed) return text;
    return Number(text) === 0 ? "0" : (value < 0 ? "\u2212" : "+") + text;
  };
  const paintPane = (pane, contrast, [low, top], shares) => {
    const { canvas, plane } = pane;
    const box = pane.figure.querySelector(".screen").getBoundingClientRect();
    const columns = 128;
    const rows = Math.max(Math.round((columns * box.height) / Math.max(box.width, 1)), 1);
    canvas.width = columns;
    canvas.height = rows;
    const context = canvas.getContext("2d");
    const picture = context.createImageData(columns, rows);
    const at = [...shares];
    for (let row = 0; row < rows; row += 1) {
      const along = (row + 0.5) / rows;
      at[plane.rows] = plane.rows === 0 ? 1 - along : along; // superior is up
      for (let column = 0; column < columns; column += 1) {
        at[plane.columns] = (column + 0.5) / columns;
        const value = valueAt(contrast.values, chosen.sentence * cells, at);
        const entry = 4 * Math.min(Math.max(Math.round((255 * (value - low)) / (top - low)), 0), 255);
        const pixel = 4 * (row * columns + column);
        for (let part = 0; part < 4; part += 1) picture.data[pixel + part] = contrast.table[entry + part];
      }
    }
    context.putImageData(picture, 0, 0);
    canvas.style.opacity = Number(opacity.value) / 100;
    canvas.style.imageRendering = blocks.checked ? "pixelated" : "auto";
  };
  const paintBar = (contrast, range) => {
    const context = stage.querySelector(".bar").getContext("2d");
    const column = context.createImageData(1, 256);
    for (let row = 0; row < 256; row += 1) {
      for (let part = 0; part < 4; part += 1) column.data[4 * row + part] = contrast.table[4 * (255 - row) + part];
    }
    context.putImageData(column, 0, 0);
    const [low, top] = range;
    const ticks = { ".high": top, ".middle": (low + top) / 2, ".low": low };
    for (const [name, value] of Object.entries(ticks)) {
      stage.querySelector(`.scale ${name}`).textContent = words(value, range, contrast.signed);
    }
  };
  const paint = () => {
    const contrast = contrasts[chosen.contrast];
    const [range, shares] = [limits(contrast), where()];
    for (const pane of figures) paintPane(pane, contrast, range, shares);
    paintBar(contrast, range);
    const here = contrasts.map((each) => {
      const value = valueAt(each.values, chosen.sentence * cells, shares);
      const title = stage.querySelector(`button[data-contrast="${contrasts.indexOf(each)}"]`).textContent;
      return `${title} ${words(value, [each.low, each.high], each.signed)}`;
    });
    stage.querySelector(".here").textContent = `At the cross: ${here.join(" · ")}`;
  };
  const press = (selector, button) => {
    for (const other of document.querySelectorAll(selector)) {
      other.setAttribute("aria-pressed", String(other === button));
    }
  };
  const goToPeak = () => {
    const peak = contrasts[chosen.contrast].peaks[chosen.sentence];
    for (const { plane, slider, positions, size } of figures) {
      const target = peak[plane.axis] * size - 0.5;
      const distances = positions.map((place) => Math.abs(place - target));
      slider.value = distances.indexOf(Math.min(...distances));
    }
    figures[0].slider.dispatchEvent(new Event("input"));
  };
  const pick = (button) => {
    chosen.sentence = Number(button.dataset.sentence);
    press("button[data-sentence]", button);
    if (data.flat) paint();
    else goToPeak();
  };
  const picks = [...document.querySelectorAll("button[data-sentence]")];
  picks.forEach((button, place) => {
    button.addEventListener("click", () => pick(button));
    button.addEventListener("keydown", (event) => {
      const next = picks[place + { ArrowDown: 1, ArrowUp: -1 }[event.key]];
      if (!next) return;
      event.preventDefault();
      next.focus();
      pick(next);
    });
  });
  for (const button of stage.querySelectorAll("button[data-contrast]")) {
    button.addEventListener("click", () => {
      chosen.contrast = Number(button.dataset.contrast);
      press("button[data-contrast]", button);
      paint();
    });
  }
  for (const button of stage.querySelectorAll("button[data-strip]")) {
    button.addEventListener("click", () => {
      press("button[data-strip]", button);
      for (const strip of stage.querySelectorAll(".strip")) strip.hidden = strip.dataset.key !== button.dataset.strip;
    });
  }
  for (const control of [blocks, own, opacity]) control.addEventListener("input", paint);
  stage.querySelector(".strongest").addEventListener("click", goToPeak);
  stage.addEventListener("drawn", paint);
  window.addEventListener("resize", paint);
  if (data.flat) paint();
  else goToPeak();
}
