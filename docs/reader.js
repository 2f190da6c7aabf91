// A router that reads what you type: the tokenizer, the embeddings and the Task Router of the run.
// It computes what tokenizer.py and orchmoe.py compute. docs/numbers.py makes its numbers.
//
// Letters: L tokens, D width of the embeddings, K abstract tasks, S skills.
(function () {
  const element = (id) => document.getElementById(id);
  const data = JSON.parse(element("moved-data").textContent);
  const explored = JSON.parse(element("explorer-data").textContent);
  const { W_task, bias, mu, sd } = data.router;
  const K = W_task.length;
  const D = mu.length;
  const LONGEST = 1024; // tokens that the router reads, as in training
  const LITTLE = 0.005; // a share that is 0 with the two decimals of the page

  // -------------------------------------------------------------------------------- the tokenizer

  // SentencePiece's rules before and beside Unicode's NFKC: some characters go, some become spaces.
  const REMOVED = /[\x01-\x08\x0b\x0e-\x1f\x7f\x8f\x9f]/g;
  const SPACES = /[\t\n\f\r\u061c\u1680\u200b\u200c\u200e\u200f\u2028\u2029\u2581\ufeff\ufffd]/g;
  const WIDE_TILDE = "\uff5e"; // stays as it is
  const SPACE = "\u2581"; // stands for a space in a piece

  const ids = new Map(); // {piece: its id}
  let lowest = 0; // score of all pieces
  data.pieces.forEach(([piece, score], id) => {
    if (score === null) return;
    ids.set(piece, id);
    lowest = Math.min(lowest, score);
  });
  const longestPiece = Math.max(...[...ids.keys()].map((piece) => piece.length));
  const unknownScore = Math.fround(lowest - 10);

  function normalise(text) {
    const parts = text.replace(REMOVED, "").replace(SPACES, " ").split(WIDE_TILDE);
    const joined = parts.map((part) => part.normalize("NFKC")).join(WIDE_TILDE);
    const trimmed = joined.replace(/ +/g, " ").replace(/^ | $/g, "");
    return trimmed && SPACE + trimmed.replaceAll(" ", SPACE);
  }

  // Return the tokens of a text, {id, text}, with the end of the sequence.
  //
  // Viterbi: best[end] is the best way to cut the first `end` characters into pieces, the one with
  // the largest sum of scores. Sums are rounded to float32, as in SentencePiece.
  function tokenise(text) {
    const characters = [...normalise(text)];
    const best = [{ score: 0 }];
    for (let start = 0; start < characters.length; start++) {
      const add = (end, id, score) => {
        const total = Math.fround(best[start].score + score);
        if (!best[end] || total > best[end].score) best[end] = { score: total, id, start };
      };
      let piece = "";
      let isKnown = false; // whether this character alone is a piece
      for (let end = start + 1; end <= characters.length; end++) {
        piece += characters[end - 1];
        if (piece.length > longestPiece) break;
        if (!ids.has(piece)) continue;
        const id = ids.get(piece);
        add(end, id, Math.fround(data.pieces[id][1]));
        if (end === start + 1) isKnown = true;
      }
      if (!isKnown) add(start + 1, data.unknown, unknownScore);
    }

    const tokens = [];
    for (let end = characters.length; end > 0; end = best[end].start) {
      const { id, start } = best[end];
      const piece = characters.slice(start, end).join("");
      const next = tokens[0];
      // Unknown characters that follow each other are one token.
      if (next && id === data.unknown && next.id === id) next.text = piece + next.text;
      else tokens.unshift({ id, text: piece });
    }
    tokens.push({ id: data.eos, text: data.pieces[data.eos][0] });
    return tokens;
  }

  // ------------------------------------------------------------------------------- the embeddings

  // The number that the 16 bits of a float in half precision stand for.
  function fromHalf(bits) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  const bytes = atob(data.embeddings);
  const table = new Float32Array(bytes.length / 2); // (pieces, D) in one row
  for (let i = 0; i < table.length; i++) {
    table[i] = fromHalf(bytes.charCodeAt(2 * i) | (bytes.charCodeAt(2 * i + 1) << 8));
  }

  // ----------------------------------------------------------------------------------- the router

  function softmax(values) {
    const largest = Math.max(...values);
    const powers = values.map((value) => Math.exp(value - largest));
    const sum = powers.reduce((total, power) => total + power, 0);
    return powers.map((power) => power / sum);
  }

  function dot(a, b) {
    let sum = 0;
    for (let d = 0; d < a.length; d++) sum += a[d] * b[d];
    return sum;
  }

  // X = rmsnorm(E), (L,D)
  function embed(tokens) {
    return tokens.map(({ id }) => {
      const row = table.subarray(id * D, (id + 1) * D);
      const size = Math.sqrt(dot(row, row) / D + 1e-6);
      return row.map((value) => value / size);
    });
  }

  // Return p (L): the attention that each token gets. It is the sum of a column of
  // P = softmax(X X^T / sqrt(D)).
  function attention(X) {
    const p = new Array(X.length).fill(0);
    for (const x of X) {
      const row = softmax(X.map((other) => dot(x, other) / Math.sqrt(D)));
      row.forEach((value, l) => (p[l] += value));
    }
    return p;
  }

  // Return w (K), and shares (L,K): what each token adds to the logits.
  //
  // x_hat = mean over l of (1 + p_l) X_l, so each logit
  // W_task (x_hat - mu) / sd + b is b plus a sum with one addend for each token.
  function route(tokens) {
    const X = embed(tokens);
    const p = attention(X);
    const shares = X.map((x, l) => {
      const standard = x.map((value, d) => ((1 + p[l]) * value - mu[d]) / sd[d] / X.length);
      return W_task.map((row) => dot(row, standard));
    });
    const logits = bias.map((b, k) => shares.reduce((sum, share) => sum + share[k], b));
    return { w: softmax(logits), shares };
  }

  // ----------------------------------------------------------------------------------- the page

  const Zhat = explored.Zhat[explored.linears.indexOf(data.linear)]; // (K,S)
  let read; // {tokens, w, shares} of the text

  function drawRow(id, values) {
    [...element(id).cells].slice(1).forEach((cell, i) => {
      cell.textContent = values[i].toFixed(2);
      cell.style.setProperty("--v", values[i].toFixed(2));
    });
  }

  // Write down how much each token moved the chosen abstract task.
  function drawShares() {
    const k = Number(element("towards").value);
    element("tokens").replaceChildren();
    read.tokens.forEach((token, l) => {
      const share = read.shares[l];
      // The softmax does not see what all logits have in common.
      const moved = share[k] - share.reduce((sum, value) => sum + value, 0) / K;
      const box = element("tokens").appendChild(document.createElement("span"));
      box.className = "token";
      if (Math.abs(moved) >= LITTLE) box.classList.add(moved > 0 ? "up" : "down");
      box.appendChild(document.createElement("b")).textContent = token.text;
      const sign = moved < 0 ? "\u2212" : "+";
      const text = Math.abs(moved) >= LITTLE ? sign + Math.abs(moved).toFixed(2) : "0";
      box.appendChild(document.createElement("i")).textContent = text;
    });
  }

  function draw() {
    const tokens = tokenise(element("typed").value).slice(0, LONGEST);
    read = { tokens, ...route(tokens) };
    const c = Zhat[0].map((_, s) => read.w.reduce((sum, value, k) => sum + value * Zhat[k][s], 0));
    drawRow("typed-w", read.w);
    drawRow("typed-c", c);
    const k = read.w.indexOf(Math.max(...read.w));
    const unknown = tokens.filter((token) => token.id === data.unknown).length;
    const lost = unknown ? ` ${unknown} of them stand for characters that have no piece.` : "";
    element("reader-says").textContent =
      `${tokens.length} tokens.${lost} Most weight: abstract task ${k + 1}, ` +
      `\u201c${explored.words[k]}\u201d.`;
    if (!hasChosen) element("towards").value = k;
    drawShares();
  }

  let hasChosen = false; // whether the reader has chosen an abstract task
  explored.words.forEach((words, k) => {
    const option = element("towards").appendChild(document.createElement("option"));
    option.value = k;
    option.textContent = `${k + 1}: ${words}`;
  });
  element("towards").addEventListener("change", () => {
    hasChosen = true;
    drawShares();
  });
  element("typed").addEventListener("input", draw);

  // Texts to begin with.
  const sample = explored.samples[explored.first];
  const prompt = explored.tasks[sample.task].head + sample.tail;
  const [definition] = prompt.split("\n");
  const texts = {
    prompt: () => prompt,
    definition: () => definition,
    input: () => sample.input,
    reversed: () => element("typed").value.trim().split(/\s+/).reverse().join(" "),
  };
  document.querySelectorAll("#reader-texts button").forEach((button) => {
    button.addEventListener("click", () => {
      element("typed").value = texts[button.value]();
      draw();
    });
  });
  element("typed").value = definition;
  draw();

  window.reader = { tokenise, route }; // for tests
})();
