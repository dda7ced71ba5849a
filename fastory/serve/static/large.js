// A frame, large: its rounds, its text, what was there before, and what changes it.

import { get, pictureAddress } from "./api.js";
import { Boxes } from "./boxes.js";
import { button, element } from "./element.js";
import { captionOf } from "./run.js";
import { attempt, say } from "./say.js";

const random = () => crypto.getRandomValues(new Uint32Array(1))[0];

export class Large {
  constructor(run) {
    this.run = run;
    this.index = 0;
    this.round = null;
    this.before = "";
    this.build();
  }

  build() {
    this.image = element("img", { alt: "" });
    this.old = element("img", { className: "before", alt: "", hidden: true });
    this.boxes = new Boxes(() => this.showButtons());
    this.sheet = element("div", { className: "sheet" }, [this.image, this.old, this.boxes.svg, this.boxes.names]);
    this.none = element("p", { className: "quiet", hidden: true }, ["Not drawn yet"]);
    this.strip = element("div", { className: "strip", role: "group", "aria-label": "Rounds" });
    this.cut = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Before and after", hidden: true, oninput: () => this.sheet.style.setProperty("--cut", `${this.cut.value}%`) });
    this.which = element("h2", { id: "large-name" });
    this.text = element("textarea", { rows: 3, oninput: () => this.showButtons() });
    this.seed = element("input", { type: "number", min: 0, oninput: () => this.showButtons() });
    this.history = element("select", { onchange: () => ((this.before = this.history.value), this.show()) });
    this.historyLabel = element("label", {}, [element("span", {}, ["Compare with"]), this.history]);
    this.backButton = button("Take the redraw back", () => attempt(() => this.takeBack()), { hidden: true, id: "take-back" });
    this.facts = element("dl");
    this.lockButton = button("Lock", () => attempt(() => this.run.lock(this.index)), { id: "lock" });
    this.redrawButton = button("Redraw", () => attempt(() => this.redraw()), { className: "main", id: "redraw" });
    this.takeButton = button("Another take", () => attempt(() => this.anotherTake(this.index)), { id: "take" });
    this.undoButton = button("Undo the changes", () => this.fill(), { className: "bare" });
    this.boxName = element("select", { "aria-label": "Character of the next box" });
    this.boxRow = element("div", { className: "row" }, [element("label", {}, [element("span", {}, ["Draw a box for"]), this.boxName]), button("No boxes", () => (this.boxes.set([]), this.showButtons()), { className: "bare" })]);
    this.noBoxes = element("p", { className: "quiet" }, ["No boxes: this run does not read them. In iterative mode they want two named characters, or boxes in the story file, before it is drawn."]);
    this.boxes.nameOf = () => this.boxName.value;
    this.dialog = element("dialog", { "aria-labelledby": "large-name", onkeydown: (event) => this.key(event), onclose: () => this.run.figures[this.index]?.open.focus() }, [
      element("div", { className: "large" }, [
        element("div", { className: "look" }, [element("div", { className: "stage" }, [this.sheet, this.none]), element("div", {}, [this.cut, this.strip])]),
        element("div", { className: "said stack" }, [
          element("div", { className: "row spread" }, [this.which, element("span", { className: "row" }, [
            button("←", () => this.step(-1), { className: "bare", "aria-label": "Frame before" }),
            button("→", () => this.step(1), { className: "bare", "aria-label": "Next frame" }),
            button("Close", () => this.dialog.close(), { className: "bare" })])]),
          element("label", {}, [element("span", {}, ["Caption"]), this.text]),
          element("label", {}, [element("span", {}, ["Seed"]), this.seed]),
          this.boxRow, this.noBoxes,
          element("div", { className: "row" }, [this.redrawButton, this.takeButton, this.lockButton]),
          this.undoButton, this.historyLabel, element("div", {}, [this.backButton]), this.facts,
          element("p", { className: "quiet" }, [...["← → frames", "↑ ↓ rounds", "L lock", "R another take"].flatMap((key, i) => [i ? ", " : "", key])]),
        ]),
      ]),
    ]);
  }

  open(index) {
    this.index = index;
    this.round = null;
    this.fill();
    this.dialog.showModal();
    this.lockButton.focus();
  }

  close() {
    if (this.dialog.open) this.dialog.close();
  }

  step(by) {
    const to = this.index + by;
    if (!this.run.frames[to]) return;
    this.index = to;
    this.fill();
  }

  key(event) {
    if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const rounds = this.run.story.pictures.length;
    const at = this.round ?? this.run.shownRound;
    const act = {
      ArrowLeft: () => this.step(-1), ArrowRight: () => this.step(1),
      ArrowUp: () => this.choose(Math.min(rounds - 1, at + 1)), ArrowDown: () => this.choose(Math.max(0, at - 1)),
      l: () => attempt(() => this.run.lock(this.index)), r: () => attempt(() => this.anotherTake(this.index)),
    }[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  choose(round) {
    this.round = round;
    this.show();
  }

  /** The fields as the story says them; what was typed and not drawn is gone. */
  fill() {
    const frame = this.run.frames[this.index];
    this.before = "";
    this.filled = this.said();
    this.text.value = captionOf(frame);
    this.seed.value = frame?.seed ?? "";
    this.seed.placeholder = `the story's (${this.run.story.settings?.seed ?? 0})`;
    this.boxes.set(Object.entries(frame?.boxes ?? {}));
    const names = Object.keys(this.run.story.story.characters ?? {});
    this.boxName.replaceChildren(...names.map((name) => element("option", { value: name }, [name])));
    const reads = this.run.story.reads.includes("boxes");
    this.boxRow.hidden = !reads || names.length === 0;
    this.noBoxes.hidden = reads || names.length === 0;
    this.boxes.active = reads && names.length > 0;
    const numbers = Object.entries(this.run.story.history).filter(([, frames]) => frames.includes(String(this.index))).map(([number]) => number);
    this.historyLabel.hidden = numbers.length === 0;
    this.history.replaceChildren(element("option", { value: "" }, ["nothing"]), ...numbers.map((n) => element("option", { value: n }, [`before redraw ${Number(n)}`])));
    this.show();
  }

  /** What the fields are made of; another means that the server has a new one. */
  said() {
    const { frames, story } = this.run;
    return JSON.stringify([frames[this.index], Object.keys(story.history)]);
  }

  change() {
    const frame = this.run.frames[this.index];
    const change = {};
    if (this.text.value.trim() && this.text.value !== captionOf(frame)) change.caption = this.text.value;
    if (this.seed.value !== "" && Number(this.seed.value) !== frame?.seed) change.seed = Number(this.seed.value);
    const boxes = this.boxes.object();
    if (JSON.stringify(boxes) !== JSON.stringify(frame?.boxes ?? {})) change.boxes = boxes;
    return change;
  }

  async redraw() {
    await this.run.redraw(this.index, this.change());
    say(`Frame ${this.index} is drawn again; the others stay as they are.`);
  }

  async takeBack() {
    await this.run.takeBack(this.before);
    this.before = this.history.value = "";
    say("The pictures and the words from before that redraw come back.");
  }

  async anotherTake(index) {
    await this.run.redraw(index, {}, random());
    say(`Another take of frame ${index}; the others stay as they are.`);
  }

  show() {
    const { run, index } = this;
    if (!run.frames[index]) return this.close(); // it has left the story
    if (this.dialog.open && this.filled !== this.said() && document.activeElement !== this.text) return this.fill();
    const round = this.round ?? run.shownRound;
    const found = run.picture(index, round);
    this.sheet.style.aspectRatio = `${run.story.width ?? 1} / ${run.story.height ?? 1}`;
    this.sheet.hidden = !found;
    this.none.hidden = Boolean(found);
    if (found && this.image.getAttribute("src") !== found.address) this.image.src = found.address;
    this.image.alt = run.caption(index);
    this.which.textContent = `Frame ${index} (${index + 1} of ${run.frames.length})`;
    const compared = this.before && found;
    this.old.hidden = this.cut.hidden = !compared;
    if (compared) this.old.src = pictureAddress(run.story.id, index, found.round, this.before, this.before);
    this.backButton.hidden = !this.before || !run.story.undoable.includes(this.before);
    this.backButton.disabled = run.story.state !== "finished" || run.isLocked(index);
    this.showStrip(found?.round ?? round);
    this.showFacts(found, round);
    this.showButtons();
  }

  showStrip(round) {
    const { run, index } = this;
    this.strip.hidden = run.story.pictures.length < 2;
    this.strip.replaceChildren(...run.story.pictures.map((pictures, k) => {
      const look = pictures[index] ? element("img", { src: pictureAddress(run.story.id, index, k, pictures[index]), alt: "" }) : String(k);
      const chosen = button("", () => this.choose(k), { "aria-label": `Round ${k}`, "aria-pressed": String(k === round) });
      chosen.append(look);
      return chosen;
    }));
  }

  /** What the picture itself says it was drawn from; asked for once a picture. */
  async showFacts(found, round) {
    const last = this.run.story.pictures.length - 1;
    const rows = (facts) => this.facts.replaceChildren(...facts.flatMap(([name, value]) => [element("dt", {}, [name]), element("dd", { className: "text" }, [String(value)])]));
    if (this.factsOf === (found?.address ?? null)) return;
    this.factsOf = found?.address ?? null;
    if (!found) return rows([["Round", `${round} of ${last}`]]);
    let said;
    try {
      said = await get(found.address.replace("?", "/drawn-from?"));
    } catch {
      return; // a newer picture has its place, and comes with its own
    }
    if (this.factsOf !== found.address) return;
    const { prompt, reference_scale: scale, left_out: leftOut } = said.values;
    const line = said.parameters.split("\n").at(-1); // it has the seed's digits; as a number they would be rounded
    const seed = line.match(/Seed: (\d+)/)?.[1] ?? "";
    const settings = line.replace(/, Seed: \d+/, "");
    rows([
      ["Round", `${found.round} of ${last}`], ["Prompt", prompt], ["Seed", seed],
      ["Reference scale", scale ? scale.toFixed(2) : "none in this round"], ["Settings", settings],
      ...(leftOut ? [["Not a reference", leftOut]] : []),
    ]);
  }

  showButtons() {
    const { run, index } = this;
    const locked = run.isLocked(index);
    const finished = run.story.state === "finished";
    const changed = Object.keys(this.change()).length > 0;
    this.lockButton.textContent = locked ? "Unlock" : "Lock";
    this.lockButton.setAttribute("aria-pressed", String(locked));
    this.redrawButton.disabled = locked || !finished || !changed;
    this.takeButton.disabled = locked || !finished;
    this.undoButton.hidden = !changed;
    const why = locked ? "The frame is locked." : finished ? "" : "Once the story is finished.";
    this.redrawButton.title = this.takeButton.title = why;
    this.text.disabled = this.seed.disabled = locked;
  }
}
