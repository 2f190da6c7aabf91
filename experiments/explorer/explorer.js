(function () {
  const data = JSON.parse(document.getElementById("explorer-data").textContent);
  const N = data.linears.length;
  const K = data.Zhat[0].length;
  const S = data.Zhat[0][0].length;
  const element = (id) => document.getElementById(id);
  const CLOSE = 0.002; // two weights that differ by less are the same: they are rounded
  const CHANGED = 0.05; // a weight that differs by more is coloured
  const SMALL = 0.1; // an abstract task whose weight is nowhere larger is not described
  const LITTLE = 0.05; // a difference of losses that is not worth a word
  const THREE = [...new Set([0, Math.floor(N / 2), N - 1])]; // the Linears that are always shown

  const ORDER = ["own", "mean", "uniform", "other", "off"];
  for (let k = 1; k <= K; k++) ORDER.push(String(k));

  // What the page shows: {question, names, settings, results, asking, w, isMoved}. The
  // question has the prompt that the model was asked, its references, and the number of its sample,
  // or -1. `asking` has the weights whose answer is on its way.
  let view;

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

  const largest = (w) => w.indexOf(Math.max(...w));
  const words = (name) => name.replaceAll("_", " ");
  const sampleWord = data.is_jsonl ? "row" : "sample";

  // Return a text of at most this length. It ends after a word, if it has spaces.
  function shortened(text, length) {
    if (text.length <= length) return text;
    return text.slice(0, length).replace(/\s+\S*$/, "") + " …";
  }

  // Return the beginning of the first line of a text, and of the last one if there are more: behind
  // an instruction, it tells rows apart.
  function brief(text) {
    const lines = text.split("\n").filter((line) => line.trim());
    if (lines.length < 2) return shortened(text.trim(), 90);
    return shortened(lines[0], 55) + " / " + shortened(lines[lines.length - 1], 40);
  }

  // Return the numbers of the three samples that have most of an abstract task.
  function strongestSamples(k) {
    const kind = data.mean_w.seen ? "seen" : "unseen";
    const numbers = [...data.samples.keys()].filter((i) => data.tasks[data.samples[i].task].kind === kind);
    numbers.sort((a, b) => data.samples[b].w[k] - data.samples[a].w[k]);
    return numbers.slice(0, 3);
  }

  // "encoder.blocks.0.attention.q" becomes "encoder 0 q".
  function shortName(linear) {
    const parts = linear.split(".").filter((part) => part !== "blocks" && part !== "attention");
    return words(parts.join(" ").replace("cross_attention", "cross"));
  }

  // ------------------------------------------------------------------------------------ questions

  function namesOf(kind, other) {
    const names = {
      now: "your sliders",
      kept: "the kept sliders",
      own: "the router",
      mean: "the mean of " + kind + " " + sampleWord + "s",
      uniform: "1/" + K + " each: no router",
      other: "another " + sampleWord + ": " + other,
      off: "no skills: w = 0",
    };
    for (let k = 1; k <= K; k++) names[k] = "abstract task " + k + " alone";
    return names;
  }

  // The settings that need no sample.
  function commonSettings() {
    const settings = { uniform: new Array(K).fill(1 / K), off: new Array(K).fill(0) };
    for (let k = 1; k <= K; k++) settings[k] = settings.off.map((_, i) => (i === k - 1 ? 1 : 0));
    return settings;
  }

  // A view of a question without answers.
  function newView(question, kind, other) {
    const settings = commonSettings();
    settings.mean = data.mean_w[kind];
    const w = settings.uniform.slice(); // until the router has answered
    return { question, names: namesOf(kind, other), settings, results: {}, asking: new Set(), w, isMoved: false };
  }

  function viewOfSample(index) {
    const sample = data.samples[index];
    const task = data.tasks[sample.task];
    const question = { prompt: task.head + sample.tail, references: sample.references, sample: index };
    const other = sample.other_task ? words(sample.other_task) : shortened(sample.other_input, 40);
    const made = newView(question, task.kind, other);
    made.settings.own = sample.w;
    made.settings.other = sample.other_w;
    made.w = sample.w.slice();
    (sample.results || []).forEach((result, i) => (made.results[ORDER[i]] = result));
    return made;
  }

  function viewOfTyped(prompt, reference) {
    const question = { prompt, references: reference ? [reference] : [], sample: -1 };
    return newView(question, data.mean_w.seen ? "seen" : "unseen", "");
  }

  // The name under which the weights of the sliders are known, or else "now".
  function nameOfCurrent() {
    const known = [...ORDER, "kept"].filter((name) => view.settings[name]);
    return known.find((name) => sameWeights(view.settings[name], view.w)) || "now";
  }

  // Send one question. Return {result, w} or {error}.
  async function send(question, w) {
    const { prompt, references } = question;
    const body = JSON.stringify({ prompt, references, w: w || null });
    let response, text;
    try {
      response = await fetch("/", { method: "POST", body });
      text = await response.text();
    } catch (error) {
      return { error: "The server does not answer. Is it still running? (" + error.message + ")" };
    }
    try {
      return JSON.parse(text);
    } catch {
      return { error: "The server refused the question (" + response.status + ")." };
    }
  }

  // Ask the model, one question after the other. A question of an older view, or of weights that
  // have moved since, is dropped.
  let last = Promise.resolve();
  function ask(name, before) {
    const asked = view;
    const weights = view.settings[name];
    if (asked.asking.has(weights)) return;
    asked.asking.add(weights);
    last = last.then(async () => {
      if (asked !== view || weights !== asked.settings[name]) {
        asked.asking.delete(weights);
        return;
      }
      element("status").textContent = "The model answers …";
      const reply = await send(asked.question, name === "own" ? null : weights);
      asked.asking.delete(weights);
      if (asked !== view) return;
      element("status").textContent = "";
      if (weights !== asked.settings[name]) return; // they moved while the model answered
      if (reply.error) {
        const isRestored = name === "own" && before;
        if (isRestored) view = before;
        const kept = isRestored ? " What you see still belongs to the question before." : "";
        element("status").textContent = "Refused: " + reply.error.replace(/\.?$/, ".") + kept;
      } else {
        asked.results[name] = reply.result;
        element("status").textContent = reply.warning;
        if (name === "own") {
          asked.settings.own = reply.w;
          if (!asked.isMoved) asked.w = reply.w.slice();
          ask("mean");
          ask("uniform");
        }
      }
      draw();
    });
  }

  function show(next) {
    const before = view;
    view = next;
    if (data.live) ask("own", before);
    draw();
  }

  function askTyped() {
    const prompt = element("prompt").value;
    if (!prompt.trim()) {
      element("status").textContent = "Type a prompt first.";
      return;
    }
    // As it was typed: in a decoder, a space before the answer may belong to it.
    const reference = element("reference").value;
    show(viewOfTyped(prompt, reference.trim() ? reference : ""));
  }

  // Choose the weights of a row.
  function choose(name) {
    if (!view.settings[name]) return;
    view.w = view.settings[name].slice();
    view.isMoved = true;
    if (data.live && !view.results[name]) ask(name);
    draw();
  }

  // On the served page, ask for the answer with the weights of the sliders.
  function askCurrent() {
    if (!data.live) return;
    const name = nameOfCurrent();
    if (name === "now") {
      view.settings.now = view.w.slice();
      delete view.results.now;
    }
    if (!view.results[name]) ask(name);
  }

  // ------------------------------------------------------------------------------------- drawing

  function cell(row, text, kind) {
    const made = row.insertCell();
    made.textContent = text;
    if (kind) made.className = kind;
    return made;
  }

  function signed(value) {
    const size = Math.abs(value).toFixed(2);
    if (Number(size) === 0) return size;
    return (value < 0 ? "\u2212" : "+") + size;
  }

  function change(value, usual) {
    if (value - usual > CHANGED) return " up";
    return value - usual < -CHANGED ? " down" : "";
  }

  function drawQuestion() {
    const { prompt, references, sample } = view.question;
    element("sample").value = sample;
    element("references").textContent = references.join("  or  ") || "(none given)";
    element("input").textContent = prompt;
    element("about").textContent = "Your own prompt belongs to no task.";
    if (sample < 0) return;
    const shown = data.samples[sample];
    const task = data.tasks[shown.task];
    // The task of the other sample, if its row names one.
    const other = data.tasks.find((each) => each.name && each.name === shown.other_task && each.kind === task.kind);
    element("input").textContent = shown.input;
    let about = "A new sample of a training task. ";
    if (task.kind === "unseen") about = "A sample of a task that this run did not train on. ";
    if (data.is_jsonl) about = task.kind === "seen" ? "A row that did not train in this run. " : "A row of the test file. ";
    if (data.tried && sample === data.first) about += reasonOfFirst();
    if (other === task) {
      about += "The other " + sampleWord + " below is of the same task.";
    } else if (task.name && other && largest(other.w) === largest(task.w)) {
      about += "Its task and that of the other " + sampleWord + " below have most weight on the same abstract task, ";
      about += largest(task.w) + 1 + ", so their w are alike.";
    }
    element("about").textContent = about;
  }

  // Say why the page opens with its first sample.
  function reasonOfFirst() {
    const many = data.tried + " seen " + sampleWord + (data.tried > 1 ? "s" : "");
    return "Of the " + many + " that were tried, its loss rises most with 1/" + K + " each. ";
  }

  function drawWeights(current) {
    const own = view.settings.own || view.w;
    view.w.forEach((value, k) => {
      element("w" + k).value = value;
      element("w" + k).style.setProperty("--v", Math.max(0, Math.min(1, value)));
      element("value" + k).textContent = value.toFixed(2);
      element("value" + k).className = change(value, own[k]).trim();
    });
    const result = view.results[current];
    element("shown").textContent = "Shown row: " + view.names[current] + ".";
    if (result && data.live) element("shown").textContent += " The answer: " + (result[0] || "(empty)");
  }

  function drawAnswers(current) {
    const body = element("answer-rows");
    const focused = document.activeElement && document.activeElement.dataset.row;
    body.textContent = "";
    const rows = current === "now" ? ["now"] : [];
    if (view.settings.kept) rows.push("kept");
    rows.push(...ORDER.filter((name) => name === "own" || view.settings[name]));
    for (const name of rows) {
      const row = body.insertRow();
      row.dataset.name = name;
      const isCurrent = name === current;
      if (isCurrent) row.className = "current";
      const head = row.appendChild(document.createElement("th"));
      head.scope = "row";
      const button = head.appendChild(document.createElement("button"));
      button.type = "button";
      button.textContent = view.names[name];
      button.dataset.row = name;
      button.setAttribute("aria-pressed", String(isCurrent));
      row.addEventListener("click", () => choose(name));
      if (name === focused) button.focus({ preventScroll: true });
      const result = view.results[name];
      if (!result) {
        const isAsked = view.asking.has(view.settings[name]);
        cell(row, isAsked ? "asking …" : "press the row to ask", "text small").colSpan = 3;
        continue;
      }
      const [text, loss, right] = result;
      const answer = cell(row, text || "(empty)", "text");
      if (right !== null) {
        const mark = document.createElement("span");
        mark.className = right ? "good" : "bad";
        mark.textContent = right ? "\u2713 " : "\u2717 ";
        mark.title = right ? "right" : "wrong";
        mark.role = "img";
        mark.ariaLabel = mark.title;
        answer.prepend(mark);
      }
      cell(row, loss === null ? "" : loss.toFixed(2));
      const own = view.results.own ? view.results.own[1] : null;
      cell(row, loss === null || own === null || name === "own" ? "" : signed(loss - own));
    }
  }

  function drawVerdict() {
    const [own, mean, uniform] = ["own", "mean", "uniform"].map((name) => view.results[name]);
    element("verdict").textContent = "";
    if (!own || !uniform || own[1] === null || uniform[1] === null) return;
    const others = mean ? [mean, uniform] : [uniform];
    const names = mean ? "the mean w and with 1/" + K : "1/" + K;
    const gaps = others.map((result) => result[1] - own[1]);
    const rights = others.filter((result) => result[2]).length;
    let text = "With the router\u2019s w the answer is " + (own[2] ? "right" : "wrong") + ". ";
    if (gaps.every((gap) => gap > LITTLE)) text += "The loss is higher with " + names + ": routing helps here";
    else if (gaps.every((gap) => gap < -LITTLE)) text += "The loss is lower with " + names + ": routing harms here";
    else if (gaps.every((gap) => Math.abs(gap) <= LITTLE))
      text += "The loss is almost the same with " + names + ": routing does next to nothing here";
    else text += "Of the mean w and 1/" + K + ", one has a higher loss and the other has not";
    if (own[2] && rights === 0) text += ", and with " + names + " the answer is wrong";
    else if (own[2] && rights < others.length) text += ", and with one of them the answer is wrong";
    if (!own[2] && rights > 0) text += ", although an answer without the router\u2019s w is right";
    element("verdict").textContent = text + ".";
  }

  function drawSkills(body, positions) {
    const now = skillWeights(view.w);
    const own = skillWeights(view.settings.own || view.w);
    body.textContent = "";
    for (const n of positions) {
      const line = body.insertRow();
      const head = line.appendChild(document.createElement("th"));
      head.scope = "row";
      head.textContent = shortName(data.linears[n]);
      now[n].forEach((value, s) => cell(line, value.toFixed(2), "value" + change(value, own[n][s])));
      own[n].forEach((value, s) => {
        const made = cell(line, value.toFixed(2), "cell" + (s ? "" : " gap"));
        made.style.setProperty("--v", Math.max(0, Math.min(1, value)));
      });
    }
  }

  function draw() {
    const current = nameOfCurrent();
    drawQuestion();
    drawWeights(current);
    drawAnswers(current);
    drawVerdict();
    drawSkills(element("skill-rows"), THREE);
    drawSkills(element("all-skill-rows"), [...data.linears.keys()]);
  }

  // --------------------------------------------------------------------------------------- start

  function addOption(parent, value, text) {
    const option = parent.appendChild(document.createElement("option"));
    option.value = value;
    option.textContent = text;
    return option;
  }

  const groups = {};
  data.samples.forEach((sample, index) => {
    const task = data.tasks[sample.task];
    if (!groups[task.kind]) {
      groups[task.kind] = element("sample").appendChild(document.createElement("optgroup"));
      groups[task.kind].label = groupLabel(task.kind);
    }
    if (data.is_jsonl) {
      addOption(groups[task.kind], index, (task.name ? words(task.name) + ": " : "") + brief(sample.input));
    } else {
      addOption(groups[task.kind], index, words(task.name) + ": " + shortened(sample.input.split("\n")[0], 60));
    }
  });

  function groupLabel(kind) {
    if (!data.is_jsonl) return kind + " tasks";
    const count = data.tasks.reduce((sum, task) => sum + (task.kind === kind ? task.count : 0), 0);
    const shown = data.samples.filter((sample) => data.tasks[sample.task].kind === kind).length;
    const some = shown < count ? ", " + shown + " of " + count : "";
    return (kind === "seen" ? "seen: rows that did not train in this run" : "unseen: rows of the test file") + some;
  }

  // Say in which prompts or tasks an abstract task is strongest.
  function meaningOf(k) {
    if (data.words) return data.words[k];
    if (data.is_jsonl) {
      const { input, w } = data.samples[strongestSamples(k)[0]];
      if (w[k] < SMALL) return "less than " + SMALL + " in all rows";
      return "most in \u201c" + brief(input) + "\u201d";
    }
    const strongest = data.tasks.reduce((most, task) => (task.w[k] > most.w[k] ? task : most));
    return "most in " + words(strongest.name);
  }

  element("tasks-count").textContent = K;
  for (let k = 0; k < K; k++) {
    const row = element("weights").appendChild(document.createElement("div"));
    row.className = "weight";
    const label = row.appendChild(document.createElement("label"));
    label.append(String(k + 1));
    label.appendChild(document.createElement("span")).textContent = ": " + meaningOf(k);
    label.title = label.textContent;
    if (data.live) {
      label.htmlFor = "w" + k;
      const slider = row.appendChild(document.createElement("input"));
      Object.assign(slider, { type: "range", id: "w" + k, step: 0.001 });
      Object.assign(slider, data.sums_to_one ? { min: 0, max: 1 } : { min: -1, max: 2 });
      slider.addEventListener("input", () => {
        view.w = moved(view.w, k, Number(slider.value));
        view.isMoved = true;
        delete view.results.now; // it is the answer before this move
        draw();
      });
      slider.addEventListener("change", askCurrent);
    } else {
      const bar = row.appendChild(document.createElement("span"));
      Object.assign(bar, { id: "w" + k, className: "bar" });
    }
    row.appendChild(document.createElement("output")).id = "value" + k;
  }

  if (data.is_jsonl) {
    element("strongest").hidden = false;
    for (let k = 0; k < K; k++) {
      element("strongest-list").appendChild(document.createElement("dt")).textContent = k + 1;
      const list = element("strongest-list").appendChild(document.createElement("dd"));
      for (const number of strongestSamples(k)) {
        const { input, w } = data.samples[number];
        const button = list.appendChild(document.createElement("button"));
        Object.assign(button, { type: "button", textContent: w[k].toFixed(2) + ": " + brief(input) });
        button.dataset.sample = number;
      }
    }
  }

  document.querySelectorAll(".skill-groups").forEach((row) => {
    cell(row, "");
    for (const title of ["this w", "the router\u2019s w"]) {
      const head = row.appendChild(document.createElement("th"));
      Object.assign(head, { colSpan: S, scope: "colgroup", textContent: title });
    }
  });
  document.querySelectorAll(".skill-numbers").forEach((row) => {
    cell(row, "skill");
    for (let s = 0; s < 2 * S; s++) {
      const head = row.appendChild(document.createElement("th"));
      Object.assign(head, { scope: "col", textContent: (s % S) + 1 });
    }
  });

  function chooseSample(index) {
    element("status").textContent = "";
    show(viewOfSample(index));
    element("prompt").value = view.question.prompt;
    element("reference").value = "";
  }

  element("sample").addEventListener("change", (event) => {
    element("back").hidden = true;
    chooseSample(Number(event.target.value));
  });
  if (data.live) {
    addOption(element("sample"), -1, "your own prompt").hidden = true;
    element("explorer").classList.add("live");
    element("whole").textContent = "The whole prompt: change it, or type one of your own";
    element("typing").hidden = false;
    element("prompt").readOnly = false;
    element("ask").addEventListener("click", askTyped);
    if (data.metric_rules === "unicode") {
      element("rules").textContent = "The rules are those for rows of JSONL: punctuation counts, case and white space do not.";
    }
    element("ask-all").hidden = false;
    element("ask-all").addEventListener("click", () => {
      ORDER.filter((name) => view.settings[name] && !view.results[name]).forEach((name) => ask(name));
    });
    element("keep").hidden = false;
    element("keep").addEventListener("click", () => {
      view.results.kept = view.results[nameOfCurrent()];
      view.settings.kept = view.w.slice();
      draw();
    });
  }

  // Elsewhere on the page a button with data-sample opens that sample here.
  let origin;
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-sample]");
    if (!button) return;
    origin = button;
    chooseSample(Number(button.dataset.sample));
    element("back").hidden = false;
    element("explorer").scrollIntoView();
    element("sample").focus({ preventScroll: true });
  });
  element("back").addEventListener("click", () => {
    element("back").hidden = true;
    origin.scrollIntoView({ block: "center" });
    origin.focus({ preventScroll: true });
  });
  chooseSample(data.first);
})();
