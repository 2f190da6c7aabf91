(function () {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const K = data.Zhat[0].length;
  const S = data.Zhat[0][0].length;
  const element = (id) => document.getElementById(id);
  const CLOSE = 0.002; // two weights that differ by less are the same: they are rounded
  const LITTLE = 0.05; // a difference of losses that is not worth a word

  const NAMES = {
    now: "your sliders",
    kept: "the kept sliders",
    own: "the router",
    mean: "the mean w",
    uniform: "1/K each",
    other: "another sample",
    off: "off",
  };
  const ORDER = ["own", "mean", "uniform", "other", "off"];
  for (let k = 1; k <= K; k++) {
    NAMES[k] = "only w" + [...String(k)].map((digit) => String.fromCodePoint(0x2080 + Number(digit))).join("");
    ORDER.push(String(k));
  }

  let sample; // the chosen one
  let settings; // {name: w}
  let results; // {name: [answer, loss, right]}
  let w; // what the sliders show

  // ------------------------------------------------------------------------------ the arithmetic

  function sameWeights(a, b) {
    return a.every((value, k) => Math.abs(value - b[k]) < CLOSE);
  }

  // c[n][s] = sum over k of w[k] Zhat[n][k][s]
  function skillWeights(w) {
    return data.Zhat.map((rows) => {
      const c = new Array(S).fill(0);
      rows.forEach((row, k) => row.forEach((value, s) => (c[s] += w[k] * value)));
      return c;
    });
  }

  // Set one weight. If weights sum to 1, the others keep their proportions.
  function moved(w, k, value) {
    if (!data.sums_to_one) return w.map((old, i) => (i === k ? value : old));
    const rest = w.reduce((sum, old, i) => (i === k ? sum : sum + old), 0);
    return w.map((old, i) => {
      if (i === k) return value;
      return rest > 0 ? (old * (1 - value)) / rest : (1 - value) / (K - 1);
    });
  }

  // ------------------------------------------------------------------------------------- answers

  // The name under which the answer with the weights of the sliders is known, or "".
  function nameOfCurrent() {
    const known = [...ORDER, "kept", "now"].filter((name) => settings[name]);
    return known.find((name) => sameWeights(settings[name], w)) || "";
  }

  // Ask the model, one question after the other. Answers to an older prompt are dropped.
  let last = Promise.resolve();
  let round = 0;
  function ask(name) {
    const asked = round;
    const weights = settings[name];
    last = last.then(async () => {
      if (asked !== round || (name === "now" && weights !== settings.now)) return;
      element("status").textContent = "The model answers …";
      const request = {
        prompt: element("prompt").value,
        reference: element("reference").value.trim(),
        w: weights || null,
      };
      try {
        const response = await fetch("/", { method: "POST", body: JSON.stringify(request) });
        const reply = await response.json();
        if (asked !== round) return;
        element("status").textContent = reply.error || "";
        if (reply.error) return;
        results[name] = reply.result;
        if (name === "own") {
          settings.own = reply.w;
          if (!settings.now) w = reply.w.slice(); // unless the sliders were moved meanwhile
          ["uniform", "off"].forEach(ask);
        }
      } catch (error) {
        element("status").textContent = "The server does not answer: " + error.message;
      }
      draw();
    });
  }

  function askAnew() {
    round += 1;
    results = {};
    delete settings.own;
    delete settings.now;
    delete settings.kept;
    draw();
    ask("own");
  }

  // ------------------------------------------------------------------------------------- drawing

  function cell(row, text, kind) {
    const made = row.insertCell();
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function signed(value) {
    return (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(3);
  }

  function drawAnswers() {
    const body = element("answer-rows");
    body.textContent = "";
    const current = nameOfCurrent();
    const rows = current ? [] : ["now"];
    if (current === "now") rows.push("now");
    if (settings.kept) rows.push("kept");
    for (const name of [...rows, ...ORDER]) {
      const row = body.insertRow();
      row.dataset.name = name;
      if (name === (current || "now")) row.className = "current";
      const head = row.appendChild(document.createElement("th"));
      head.scope = "row";
      const button = head.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = NAMES[name];
      button.addEventListener("click", () => choose(settings[name] || w));
      const result = results[name];
      if (!result) {
        const missing = data.live ? "not asked yet" : "not stored: the served page answers for any w";
        cell(row, missing, "text small").colSpan = 3;
        continue;
      }
      const [text, loss, right] = result;
      const shown = cell(row, text || "(empty)", "text");
      if (right !== null) {
        const mark = document.createElement("span");
        mark.className = right ? "good" : "bad";
        mark.textContent = right ? " \u2713 right" : " \u2717 wrong";
        shown.append(mark);
      }
      cell(row, loss === null ? "" : loss.toFixed(3));
      const own = results.own ? results.own[1] : null;
      cell(row, loss === null || own === null || name === "own" ? "" : signed(loss - own));
    }
  }

  function drawVerdict() {
    const [own, mean, uniform] = ["own", "mean", "uniform"].map((name) => results[name]);
    element("verdict").textContent = "";
    if (!own || !uniform || own[1] === null) return;
    const others = mean ? [mean, uniform] : [uniform];
    const names = mean ? "the mean w and 1/K" : "1/K";
    const gaps = others.map((result) => result[1] - own[1]);
    const rights = others.filter((result) => result[2]).length;
    let text = "With its own w the answer is " + (own[2] ? "right" : "wrong") + ". ";
    if (gaps.every((gap) => gap > LITTLE)) text += "The loss is higher with " + names + ": routing helps here";
    else if (gaps.every((gap) => gap < -LITTLE)) text += "The loss is lower with " + names + ": routing harms here";
    else if (gaps.every((gap) => Math.abs(gap) <= LITTLE))
      text += "The loss is almost the same with " + names + ": routing does next to nothing here";
    else text += "Compared with " + names + ", the loss says no clear word about routing here";
    if (own[2] && rights < others.length) text += ", and without it the right answer is lost";
    if (!own[2] && rights > 0) text += ", although without it an answer is right";
    element("verdict").textContent = text + ".";
  }

  function drawSkills() {
    const now = skillWeights(w);
    const own = skillWeights(settings.own || w);
    const body = element("skill-rows");
    body.textContent = "";
    let sum = 0;
    now.forEach((row, n) => {
      const line = body.insertRow();
      cell(line, data.linears[n].replace("blocks.", "").replace(/[._]/g, " "));
      [row, own[n]].forEach((c, group) =>
        c.forEach((value, s) => {
          const made = cell(line, value.toFixed(2), "cell" + (group && !s ? " gap" : ""));
          made.style.setProperty("--v", Math.max(0, Math.min(1, value)));
        }),
      );
      row.forEach((value, s) => (sum += Math.abs(value - own[n][s])));
    });
    element("difference").textContent =
      "Mean difference between the two sides: " + (sum / (now.length * S)).toFixed(3) + ".";
  }

  function draw() {
    w.forEach((value, k) => {
      element("w" + k).value = value;
      element("value" + k).textContent = value.toFixed(3);
    });
    const current = nameOfCurrent();
    element("state").textContent = current && current !== "now"
      ? "The sliders show w of: " + NAMES[current] + "."
      : "This w is your own; the router gives this sample another.";
    drawAnswers();
    drawVerdict();
    drawSkills();
  }

  // -------------------------------------------------------------------------------------- choices

  function choose(weights) {
    w = weights.slice();
    draw();
    askCurrent();
  }

  // On the served page, ask for the answer with the weights of the sliders.
  function askCurrent() {
    if (!data.live) return;
    let name = nameOfCurrent();
    if (!name || name === "now") {
      name = "now";
      settings.now = w.slice();
      delete results.now;
    }
    if (!results[name]) ask(name);
  }

  function chooseSample(index) {
    sample = data.samples[index];
    const task = data.tasks[sample.task];
    settings = {
      own: sample.w,
      mean: data.mean_w[task.kind],
      uniform: new Array(K).fill(1 / K),
      other: sample.other_w,
      off: new Array(K).fill(0),
    };
    for (let k = 1; k <= K; k++) settings[k] = settings.off.map((_, i) => (i === k - 1 ? 1 : 0));
    results = {};
    (sample.results || []).forEach((result, i) => (results[ORDER[i]] = result));
    w = sample.w.slice();
    element("sample").value = index;
    element("about").textContent =
      (task.kind === "seen" ? "A new sample of a training task. " : "A sample of a task that was not trained on. ") +
      "The other sample in the table is of " + sample.other_task.replaceAll("_", " ") + ".";
    element("prompt").value = task.head + sample.tail;
    element("reference").value = data.live ? sample.references[0] || "" : sample.references.join("  or  ");
    if (data.live) askAnew();
    else draw();
  }

  // --------------------------------------------------------------------------------------- start

  const groups = {};
  data.samples.forEach((entry, index) => {
    const task = data.tasks[entry.task];
    if (!groups[task.kind]) {
      groups[task.kind] = document.createElement("optgroup");
      groups[task.kind].label = task.kind + " tasks";
      element("sample").append(groups[task.kind]);
    }
    const option = document.createElement("option");
    option.value = index;
    const input = entry.tail.replace(/^Input: /, "").split("\n")[0];
    const beginning = input.length > 60 ? input.slice(0, 59) + "…" : input;
    option.textContent = task.name.replaceAll("_", " ") + ": " + beginning;
    groups[task.kind].append(option);
  });

  for (let k = 0; k < K; k++) {
    const row = element("weights").appendChild(document.createElement("div"));
    row.className = "weight";
    const label = row.appendChild(document.createElement("label"));
    label.htmlFor = "w" + k;
    const strongest = data.tasks.reduce((most, task) => (task.w[k] > most.w[k] ? task : most));
    label.textContent = k + 1 + ": " + (data.words ? data.words[k] : "most in " + strongest.name.replaceAll("_", " "));
    const slider = row.appendChild(document.createElement("input"));
    Object.assign(slider, { type: "range", id: "w" + k, step: 0.001 });
    Object.assign(slider, data.sums_to_one ? { min: 0, max: 1 } : { min: -1, max: 2 });
    row.appendChild(document.createElement("output")).id = "value" + k;
    slider.addEventListener("input", () => {
      w = moved(w, k, Number(slider.value));
      draw();
    });
    slider.addEventListener("change", askCurrent);
  }

  cell(element("skill-groups"), "");
  for (const title of ["with these sliders", "with the router\u2019s w"]) {
    const head = element("skill-groups").appendChild(document.createElement("th"));
    head.colSpan = S;
    head.scope = "colgroup";
    head.textContent = title;
    head.style.textAlign = "center";
  }
  cell(element("skill-numbers"), "skill");
  for (let s = 0; s < 2 * S; s++) {
    const head = element("skill-numbers").appendChild(document.createElement("th"));
    head.scope = "col";
    head.style.textAlign = "center";
    head.textContent = (s % S) + 1;
  }

  element("sample").addEventListener("change", (event) => chooseSample(Number(event.target.value)));
  element("ask").addEventListener("click", askAnew);
  element("keep").addEventListener("click", () => {
    const name = nameOfCurrent() || "now";
    settings.kept = w.slice();
    delete results.kept;
    if (results[name]) results.kept = results[name];
    draw();
  });
  if (data.live) {
    element("ask").hidden = false;
    element("prompt").readOnly = false;
    element("reference").readOnly = false;
  }
  // Elsewhere on the page a button with data-sample opens that sample here.
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-sample]");
    if (!button) return;
    chooseSample(Number(button.dataset.sample));
    element("explorer").scrollIntoView();
    element("sample").focus({ preventScroll: true });
  });
  chooseSample(data.first);
})();
