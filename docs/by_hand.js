// Two skills by hand: S = 2 skills of rank R = 1 in a Linear with D = O = 4, and K = 2 abstract
// tasks. The sliders set w and Z, and the switch says whether outputs or factors are mixed.
(function () {
  const element = (id) => document.getElementById(id);
  const SKILLS = [0, 1];
  const NAMES = ["\u2081", "\u2082"]; // the subscripts 1 and 2
  const A = [
    [1, 0.5, 0, 0],
    [0, 0, 0.5, 1],
  ]; // A[s]: one row, since R = 1
  const B = [
    [1, -0.5, 0, 0],
    [0, 0, -0.5, 1],
  ]; // B[s]: one column
  const NONE = 0.005; // a weight below this counts as 0: the page shows two decimals

  const sigmoid = (z) => 1 / (1 + Math.exp(-z));
  const shown = (value) => value.toFixed(2).replace("-", "\u2212");

  // ----------------------------------------------------------------------------- the arithmetic

  // Zhat = sigmoid(Z), each row divided by its sum.
  function allocation(Z) {
    return Z.map((row) => {
      const used = row.map(sigmoid);
      const sum = used[0] + used[1];
      return used.map((value) => value / sum);
    });
  }

  // The weight of the term B_i A_j. Outputs have no terms with i unlike j.
  function weightOfTerm(c, i, j, isFactors) {
    if (isFactors) return c[i] * c[j];
    return i === j ? c[i] : 0;
  }

  // The matrix weight B_i A_j, (O,D).
  function term(weight, i, j) {
    return B[i].map((b) => A[j].map((a) => weight * b * a));
  }

  function sumOf(matrices) {
    return matrices[0].map((row, o) =>
      row.map((_, d) => matrices.reduce((sum, matrix) => sum + matrix[o][d], 0))
    );
  }

  // ------------------------------------------------------------------------------------ drawing

  // Draw a matrix of 4 x 4 numbers as a heat map with signs.
  function drawMatrix(table, matrix) {
    table.replaceChildren();
    for (const row of matrix) {
      const line = table.insertRow();
      for (const value of row) {
        const cell = line.insertCell();
        const text = shown(value);
        cell.textContent = Number(value.toFixed(2)) === 0 ? "0" : text;
        cell.className = value < 0 ? "signed minus" : "signed";
        cell.style.setProperty("--v", Math.abs(value).toFixed(2));
      }
    }
  }

  function drawHeat(cell, value) {
    cell.textContent = value.toFixed(2);
    cell.style.setProperty("--v", value.toFixed(2));
  }

  function draw() {
    const w1 = Number(element("hand-w").value);
    const w = [w1, 1 - w1];
    const Z = SKILLS.map((k) => SKILLS.map((s) => Number(element(`hand-Z${k}${s}`).value)));
    const Zhat = allocation(Z);
    const c = SKILLS.map((s) => w[0] * Zhat[0][s] + w[1] * Zhat[1][s]);
    const isFactors = element("hand-factors").checked;

    document.querySelectorAll("#hand input[type=range]").forEach((slider) => {
      slider.nextElementSibling.textContent = shown(Number(slider.value));
    });
    for (const s of SKILLS) {
      for (const k of SKILLS) drawHeat(element(`hand-Zhat${k}${s}`), Zhat[k][s]);
      drawHeat(element(`hand-c${s}`), c[s]);
    }

    const terms = [];
    for (const i of SKILLS) {
      for (const j of SKILLS) {
        const weight = weightOfTerm(c, i, j, isFactors);
        const matrix = term(weight, i, j);
        terms.push(matrix);
        const box = element(`hand-term${i}${j}`);
        const isCross = i !== j;
        box.classList.toggle("lit", isCross && isFactors);
        box.classList.toggle("absent", isCross && !isFactors);
        const factor = isFactors ? `c${NAMES[i]} c${NAMES[j]}` : `c${NAMES[i]}`;
        const product = `B${NAMES[i]} A${NAMES[j]}`;
        const title = box.querySelector("figcaption");
        title.textContent =
          isCross && !isFactors ? `no ${product}` : `${factor} ${product}, weight ${shown(weight)}`;
        drawMatrix(box.querySelector("table"), matrix);
      }
    }
    drawMatrix(element("hand-sum"), sumOf(terms));

    // The columns of B and the rows of A are independent, so outputs have a rank for each skill.
    const used = c.filter((value) => value >= NONE).length;
    const rank = isFactors ? 1 : used;
    element("hand-says").textContent = isFactors
      ? `Factors: c = (${shown(c[0])}, ${shown(c[1])}). The sum has rank ${rank}, with cross terms ` +
        `of weight ${shown(c[0] * c[1])}.`
      : `Outputs: c = (${shown(c[0])}, ${shown(c[1])}). The sum has rank ${rank}, and no cross terms.`;
  }

  element("hand").addEventListener("input", draw);
  draw();
})();
