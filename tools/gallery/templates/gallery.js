"use strict";

// index page: filters over the embedded list
const form = document.querySelector(".filters");
if (form) {
  const studies = JSON.parse(document.getElementById("studies-data").textContent);
  const cards = [...document.querySelectorAll(".cards > li")];
  const output = form.querySelector("output");
  const fits = (study, want) =>
    (!want.corpus || study.corpus === want.corpus) &&
    (!want.split || study.split === want.split) &&
    (!want.label || study.labels[want.label] === Number(want.state)) &&
    (!want.bad || study.bad || study.warned) &&
    want.words.every((word) => study.text.includes(word));
  const apply = () => {
    const want = Object.fromEntries(new FormData(form));
    want.words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    studies.forEach((study, number) => {
      const hit = fits(study, want);
      cards[number].hidden = !hit;
      shown += hit;
    });
    output.textContent = `${shown} of ${studies.length}`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(apply));
  apply();
}

// study page: three linked panes over strips of pre-drawn slices
const viewer = document.querySelector(".viewer");
if (viewer) {
  const panes = {};
  for (const figure of viewer.querySelectorAll(".pane")) {
    panes[figure.dataset.plane] = {
      figure,
      screen: figure.querySelector(".screen"),
      strip: figure.querySelector(".strip"),
      slider: figure.querySelector("input"),
      output: figure.querySelector("output"),
      positions: JSON.parse(figure.dataset.positions),
      size: Number(figure.dataset.size),
      step: Number(figure.dataset.step),
    };
  }
  // which plane's position shows as the line of each pane; positions along z grow upwards
  const lines = { axial: ["coronal", "sagittal"], coronal: ["axial", "sagittal"], sagittal: ["axial", "coronal"] };
  const position = (name) => panes[name].positions[Number(panes[name].slider.value)];
  const share = (name) => {
    const along = (position(name) + 0.5) / panes[name].size;
    return name === "axial" ? 1 - along : along;
  };
  const cross = viewer.querySelector(".cross");
  const draw = () => {
    for (const [name, pane] of Object.entries(panes)) {
      pane.screen.style.setProperty("--frame", pane.slider.value);
      const millimetres = Math.round(position(name) * pane.step);
      pane.output.textContent = `${position(name) + 1} of ${pane.size}, ${millimetres} mm ${pane.figure.dataset.from}`;
      const [across, down] = [pane.figure.querySelector(".line.h"), pane.figure.querySelector(".line.v")];
      across.style.top = `${100 * share(lines[name][0])}%`;
      down.style.left = `${100 * share(lines[name][1])}%`;
      across.hidden = down.hidden = !cross.checked;
      across.dataset.plane = lines[name][0];
      down.dataset.plane = lines[name][1];
    }
    viewer.dispatchEvent(new Event("drawn"));
  };
  const go = (name, along) => {
    const pane = panes[name];
    const target = (name === "axial" ? 1 - along : along) * pane.size - 0.5;
    const distances = pane.positions.map((place) => Math.abs(place - target));
    pane.slider.value = distances.indexOf(Math.min(...distances));
  };
  const showWindow = (key) => {
    const button = viewer.querySelector(`button[data-window="${CSS.escape(key)}"]`);
    if (!button) return;
    for (const other of viewer.querySelectorAll("button[data-window]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    for (const [name, pane] of Object.entries(panes)) {
      const folder = pane.strip.getAttribute("src").split("/").slice(0, -1).join("/");
      pane.strip.src = `${folder}/${name}-${key}.png`;
      pane.strip.alt = `${name} slices, ${key} window`;
    }
    try {
      sessionStorage.setItem("window", key);
    } catch {
      // storage may be forbidden for local files; the choice then lasts for this page
    }
  };
  for (const [name, pane] of Object.entries(panes)) {
    pane.slider.addEventListener("input", draw);
    pane.screen.addEventListener("click", (event) => {
      const box = pane.screen.getBoundingClientRect();
      go(lines[name][0], (event.clientY - box.top) / box.height);
      go(lines[name][1], (event.clientX - box.left) / box.width);
      draw();
    });
    const step = (event, by) => {
      event.preventDefault();
      pane.slider.value = Number(pane.slider.value) + by;
      draw();
    };
    pane.screen.addEventListener("wheel", (event) => {
      if (document.activeElement === pane.screen) step(event, event.deltaY > 0 ? -1 : 1);
    }, { passive: false });
    pane.screen.addEventListener("keydown", (event) => {
      if (event.key === "ArrowUp" || event.key === "ArrowRight") step(event, 1);
      if (event.key === "ArrowDown" || event.key === "ArrowLeft") step(event, -1);
    });
  }
  for (const button of viewer.querySelectorAll("button[data-window]")) {
    button.addEventListener("click", () => showWindow(button.dataset.window));
  }
  cross.addEventListener("change", draw);
  let kept = null;
  try {
    kept = sessionStorage.getItem("window");
  } catch {
    // see above
  }
  if (kept && kept !== viewer.dataset.window) showWindow(kept);
  draw();
}
