// A story that is being written: captions as cards, characters, how it is drawn. Every change is kept, and checked, at once.

import { get, send } from "./api.js";
import { dropZone } from "./drop.js";
import { button, element } from "./element.js";
import { attempt, say } from "./say.js";

const WAIT = 350; // milliseconds after the last key
const MOST_UNDONE = 50;

const captionOf = (frame) => (typeof frame === "string" ? frame : (frame?.caption ?? ""));
const withCaption = (frame, caption) => (typeof frame === "object" && frame ? { ...frame, caption } : caption);

/** One caption a line; a line alone is taken apart into its sentences. */
export function split(text) {
  const lines = text.split(/\r?\n/).map((line) => line.trim()).filter(Boolean);
  return lines.length > 1 ? lines : (lines[0]?.match(/[^.!?…]+[.!?…]*["”»)]*\s*/g) ?? []).map((s) => s.trim()).filter(Boolean);
}

class Draft {
  constructor(story, tables) {
    this.id = story.id;
    this.tables = tables;
    this.said = { title: "", frames: [""], ...story.story };
    if (!Array.isArray(this.said.frames)) this.said.frames = [""];
    this.said.settings ??= {};
    this.said.characters ??= {};
    this.people = Object.entries(this.said.characters).map(([name, entry]) => ({ name, ...entry }));
    this.timer = 0;
    this.checks = element("div", { className: "checks", role: "status" });
    this.cards = element("ol", { className: "captions" });
    this.cast = element("div", { className: "stack" });
    this.past = []; // captions before each change
    this.typing = null; // the card whose text is being changed
    this.undoButton = button("Undo", () => this.undo(), { id: "undo", disabled: true });
  }

  /** What a story file would say: nothing that is left empty. */
  document() {
    const said = { ...this.said, frames: this.said.frames.filter((frame) => captionOf(frame).trim()) };
    said.characters = Object.fromEntries(this.people.filter((p) => p.name.trim()).map(({ name, ...entry }) => [name, clean(entry)]));
    return clean(said);
  }

  changed() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => attempt(() => this.keep()), WAIT);
  }

  async keep() {
    clearTimeout(this.timer);
    const story = this.document();
    await send("PUT", `/stories/${this.id}`, { story });
    const { error, notices } = story.frames ? await send("POST", "/check", { story }) : { error: null, notices: [] };
    this.checks.replaceChildren(
      ...(error ? [element("p", { className: "note bad text" }, [error])] : []),
      ...notices.map((notice) => element("p", { className: "note warn text" }, [notice])),
    );
  }

  // Captions.

  setFrames(frames) {
    this.remember(null);
    this.putFrames(frames);
  }

  putFrames(frames) {
    this.said.frames = frames.length ? frames : [""];
    this.drawCards();
    this.changed();
  }

  /** What the captions are now can be had again; of typing in one card, what was there before its first letter. */
  remember(typing) {
    if (typing !== null && this.typing === typing) return;
    this.typing = typing;
    this.past = [...this.past.slice(1 - MOST_UNDONE), [...this.said.frames]];
    this.undoButton.disabled = false;
  }

  undo() {
    const before = this.past.pop();
    this.undoButton.disabled = !this.past.length;
    this.typing = null;
    if (before) this.putFrames(before);
  }

  move(from, to) {
    const frames = [...this.said.frames];
    frames.splice(to, 0, ...frames.splice(from, 1));
    this.setFrames(frames);
    this.cards.querySelectorAll("textarea")[to]?.focus();
  }

  remove(index) {
    this.setFrames(this.said.frames.filter((_, i) => i !== index));
    say(`Caption ${index} is gone.`, () => this.undo());
  }

  add(captions) {
    const kept = this.said.frames.filter((frame) => captionOf(frame).trim());
    this.setFrames([...kept, ...captions]);
    const boxes = this.cards.querySelectorAll("textarea");
    boxes[boxes.length - 1].focus();
  }

  drawCards() {
    this.cards.replaceChildren(...this.said.frames.map((frame, index) => this.card(frame, index)));
  }

  card(frame, index) {
    const last = this.said.frames.length - 1;
    const text = element("textarea", {
      value: captionOf(frame), rows: 2, "aria-label": `Caption ${index}`, placeholder: "What is to be seen",
      oninput: () => (this.remember(index), (this.said.frames[index] = withCaption(this.said.frames[index], text.value)), this.changed()),
      onpaste: (event) => this.paste(event, text),
    });
    const bare = (label, name, action, disabled) => button(label, action, { className: "bare", "aria-label": `${name} caption ${index}`, title: name, disabled });
    const grip = element("span", { className: "grip", draggable: true, title: "Drag to move", "aria-hidden": "true" }, [`${index} ⠿`]);
    const card = element("li", { className: "caption-card card" }, [
      grip, text,
      element("div", { className: "row" }, [
        bare("↑", "Earlier", () => this.move(index, index - 1), index === 0),
        bare("↓", "Later", () => this.move(index, index + 1), index === last),
        bare("Delete", "Delete", () => this.remove(index)),
      ]),
    ]);
    this.dragging(card, grip, index);
    return card;
  }

  /** Many lines pasted into an empty card become cards. */
  paste(event, text) {
    const pasted = event.clipboardData?.getData("text/plain") ?? "";
    if (text.value.trim() || !/\n./.test(pasted)) return;
    event.preventDefault();
    this.add(split(pasted));
  }

  dragging(card, grip, index) {
    grip.addEventListener("dragstart", (event) => {
      event.dataTransfer.setData("text/plain", String(index));
      event.dataTransfer.setDragImage(card, 20, 20);
      this.from = index;
      card.classList.add("moving");
    });
    grip.addEventListener("dragend", () => (card.classList.remove("moving"), (this.from = undefined)));
    card.addEventListener("dragover", (event) => {
      if (this.from === undefined) return;
      event.preventDefault();
      card.classList.add("over");
    });
    card.addEventListener("dragleave", () => card.classList.remove("over"));
    card.addEventListener("drop", (event) => {
      if (this.from === undefined) return;
      event.preventDefault();
      this.move(this.from, index);
    });
  }

  // Characters.

  drawCast() {
    this.cast.replaceChildren(...this.people.map((person, index) => this.person(person, index)));
  }

  person(person, index) {
    const set = (name, value) => ((person[name] = value), this.changed());
    const field = (name, label, placeholder) => {
      const input = element("input", { value: person[name] ?? "", placeholder, oninput: () => set(name, input.value) });
      return element("label", {}, [element("span", {}, [label]), input]);
    };
    const removed = () => {
      const before = [...this.people];
      this.people.splice(index, 1);
      this.drawCast(), this.changed();
      say(`${person.name || "The character"} is gone.`, () => ((this.people = before), this.drawCast(), this.changed()));
    };
    return element("div", { className: "person" }, [
      element("div", { className: "pair" }, [field("name", "Name", "Mia"), button("Remove", removed, { className: "bare" })]),
      field("prompt", "Looks like", "a fox with a red scarf"),
      this.drop(person),
    ]);
  }

  drop(person) {
    return this.zone(person.references ?? [], `A picture of ${person.name}`, "Add pictures", true, (names) => {
      person.references = [...(person.references ?? []), ...names];
      this.drawCast();
    });
  }

  zone(names, alt, label, many, taken) {
    return dropZone(`/stories/${this.id}`, { names, alt, label, many, taken: (uploaded) => (taken(uploaded), this.changed()) });
  }

  /** Causal mode: the picture that the story goes on from. */
  firstFrame(draw) {
    const now = this.said.first_frame;
    const zone = this.zone(now ? [now] : [], "The first frame", now ? "Another picture" : "Choose a picture", false, ([name]) => ((this.said.first_frame = name), draw()));
    if (now) zone.append(button("Remove", () => (delete this.said.first_frame, this.changed(), draw()), { className: "bare" }));
    return element("div", {}, [element("span", { className: "label" }, ["First frame: a picture that the story goes on from"]), zone]);
  }

  // How it is drawn.

  setting(row) {
    const set = (value) => {
      if (value === undefined) delete this.said.settings[row.name];
      else this.said.settings[row.name] = value;
      this.changed();
    };
    const now = this.said.settings[row.name];
    const label = row.name.replaceAll("_", " ");
    if (row.kind === "choice") {
      const options = row.words.map((word) => element("option", { value: word, selected: now === word }, [word]));
      const select = element("select", { onchange: () => set(select.value || undefined) }, [element("option", { value: "" }, [`${row.default} (default)`]), ...options]);
      return element("label", {}, [element("span", {}, [label]), select]);
    }
    if (row.kind === "pair") {
      const input = element("input", { value: now?.join(" : ") ?? "", placeholder: row.default.join(" : "), oninput: () => set(pair(input.value)) });
      return element("label", {}, [element("span", {}, [label]), input]);
    }
    const number = row.kind === "number";
    const read = (text) => (text === "" ? undefined : number || /^\d+$/.test(text) ? Number(text) : text);
    const input = element("input", { type: number ? "number" : "text", step: row.step, value: now ?? "", placeholder: row.default ?? "model's own", oninput: () => set(read(input.value)) });
    return element("label", {}, [element("span", {}, [label]), input]);
  }

  drawing() {
    const holder = element("div", { className: "stack" });
    const draw = () => {
      const mode = this.said.settings.mode ?? Object.keys(this.tables.modes)[0];
      const rows = this.tables.modes[mode] ?? [];
      const modes = Object.keys(this.tables.modes).map((name) =>
        button(name, () => (this.setMode(name), draw()), { "aria-pressed": String(name === mode) }));
      holder.replaceChildren(
        element("div", { className: "row", role: "group", "aria-label": "Mode" }, modes),
        this.presets(draw),
        element("div", { className: "pair" }, [this.text("seed", "Seed", "0"), ...rows.filter((row) => row.main).map((row) => this.setting(row))]),
        ...(this.tables.first_frame.includes(mode) ? [this.firstFrame(draw)] : []),
        element("details", {}, [element("summary", {}, ["More settings"]), element("div", { className: "pair" }, rows.filter((row) => !row.main).map((row) => this.setting(row)))]),
      );
    };
    draw();
    return holder;
  }

  /** A published method: its values are put into the fields, where they can be changed. */
  presets(draw) {
    const names = Object.keys(this.tables.presets);
    const take = () => {
      const before = this.said.settings;
      const put = (settings) => ((this.said.settings = settings), this.changed(), draw());
      put({ ...(before.seed === undefined ? {} : { seed: before.seed }), ...this.tables.presets[select.value] });
      say(`Drawn as ${select.value}: its values are in the fields.`, () => put(before));
    };
    const options = names.map((name) => element("option", { value: name, selected: this.isPreset(name) }, [name]));
    const select = element("select", { id: "preset", onchange: take }, [element("option", { value: "", disabled: true, selected: !names.some((name) => this.isPreset(name)) }, ["none"]), ...options]);
    return element("label", {}, [element("span", {}, ["Preset"]), select]);
  }

  isPreset(name) {
    return Object.entries(this.tables.presets[name]).every(([key, value]) => JSON.stringify(this.said.settings[key]) === JSON.stringify(value));
  }

  setMode(mode) {
    const known = new Set(this.tables.modes[mode].map((row) => row.name));
    this.said.settings = Object.fromEntries(Object.entries(this.said.settings).filter(([name]) => known.has(name) || name === "seed"));
    this.said.settings.mode = mode;
    this.changed();
  }

  text(name, label, placeholder) {
    const isSeed = name === "seed";
    const holder = isSeed ? this.said.settings : this.said;
    const input = element("input", {
      value: holder[name] ?? "", placeholder, type: isSeed ? "number" : "text", min: 0,
      oninput: () => {
        const to = isSeed ? this.said.settings : this.said;
        to[name] = input.value === "" ? undefined : isSeed ? Number(input.value) : input.value;
        this.changed();
      },
    });
    return element("label", {}, [element("span", {}, [label]), input]);
  }

  style() {
    const field = this.text("style", "Style", "none");
    field.querySelector("input").setAttribute("list", "styles");
    const list = element("datalist", { id: "styles" }, this.tables.styles.map((style) => element("option", { value: style })));
    return element("div", {}, [field, list]);
  }
}

function pair(text) {
  const numbers = text.split(/[:;\s]+/).filter(Boolean).map(Number);
  return numbers.length ? numbers : undefined;
}

/** Without what is empty. */
function clean(value) {
  const filled = Object.entries(value).filter(([, v]) => v !== undefined && v !== "" && v !== null
    && !(Array.isArray(v) && !v.length) && !(v.constructor === Object && !Object.keys(v).length));
  return Object.fromEntries(filled);
}

function panel(title, children) {
  return element("section", { className: "card stack" }, [element("h2", {}, [title]), ...children]);
}

function pasteBox(draft) {
  const text = element("textarea", { rows: 4, placeholder: "A text: a caption a line, or sentence after sentence", "aria-label": "Text to split" });
  const take = button("Split into captions", () => {
    const captions = split(text.value);
    if (!captions.length) return;
    draft.add(captions);
    text.value = "";
  });
  return element("details", {}, [element("summary", {}, ["Paste a whole text"]), element("div", { className: "stack" }, [text, element("div", {}, [take])])]);
}

export async function showDraft(main, story) {
  const draft = new Draft(story, await get("/choices"));
  const title = element("input", { className: "title", value: draft.said.title ?? "", placeholder: "Title", "aria-label": "Title", oninput: () => ((draft.said.title = title.value), draft.changed()) });
  const draw = button("Draw the story", () => attempt(async () => {
    await draft.keep();
    await send("POST", `/stories/${story.id}/draw`, {});
  }), { className: "main", id: "draw" });
  draft.drawCards();
  draft.drawCast();
  const failed = story.error ? element("p", { className: "note bad text" }, [story.error]) : null;
  main.replaceChildren(
    element("div", { className: "write" }, [
      element("div", { className: "stack" }, [
        title, failed, draft.cards,
        element("div", { className: "row" }, [button("Add a caption", () => draft.add([""]), { id: "add" }), draft.undoButton]),
        pasteBox(draft),
      ].filter(Boolean)),
      element("div", { className: "stack" }, [
        panel("Characters", [draft.cast, element("div", {}, [button("Add a character", () => (draft.people.push({ name: "" }), draft.drawCast()))])]),
        panel("Look", [draft.style(), draft.text("negative_prompt", "Not to be seen", "monochrome, lowres")]),
        panel("Drawing", [draft.drawing()]),
      ]),
    ]),
    element("div", { className: "dock" }, [draft.checks, element("div", { className: "row" }, [draw, element("span", { className: "quiet" }, ["Every change is kept."])])]),
  );
  attempt(() => draft.keep());
  return () => clearTimeout(draft.timer);
}
