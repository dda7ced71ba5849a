// A story that is drawn: frames as they come, rounds, and what can be changed.

import { get, listen, pictureAddress, send } from "./api.js";
import { button, element } from "./element.js";
import { Given } from "./given.js";
import { Large } from "./large.js";
import { createStory, counted, STATES } from "./list.js";
import { attempt, say } from "./say.js";

export const captionOf = (frame) => (typeof frame === "string" ? frame : (frame?.caption ?? ""));

const TAKEN = [
  ["storybook.html", "Storybook"], ["sheet.png", "Contact sheet"], ["story.yaml", "Story file"], ["pictures.zip", "All pictures (zip)"],
  ["pages.pdf", "PDF, a picture a page"], ["comic.pdf", "PDF, four a page"], ["strip.png", "Comic strip"], ["animated.webp", "Animated WebP"],
  ["film.mp4", "Film (MP4)"],
];

/** Frames that follow each other: 3, or 3 to 5. */
const listed = (frames) => (frames.length > 1 ? `${frames[0]} to ${frames.at(-1)}` : String(frames[0]));

function timeOf(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `about ${Math.max(1, Math.round(seconds))} s left`;
  return `about ${Math.round(seconds / 60)} min left`;
}

/** A run's view. Its state is the server's: what is shown is always what GET /stories/ID said last. */
export class Run {
  constructor(main, story) {
    this.main = main;
    this.story = story;
    this.round = null; // null follows the newest
    this.large = new Large(this);
    this.given = new Given(this);
    this.build();
  }

  get path() {
    return `/stories/${this.story.id}`;
  }

  /** What the frames say, those included that are being drawn to the end of the story. */
  get frames() {
    const said = this.story.story.frames;
    return [...(Array.isArray(said) ? said : []), ...this.story.appended];
  }

  caption(index) {
    return captionOf(this.frames[index]);
  }

  get newest() {
    const drawn = this.story.pictures.map((pictures) => Object.keys(pictures).length > 0);
    return Math.max(0, drawn.lastIndexOf(true));
  }

  get shownRound() {
    return this.round ?? this.newest;
  }

  isLocked(index) {
    return this.story.locked.includes(index);
  }

  /** The address of a picture of a round, of the newest one before it where it is not drawn yet, or null. */
  picture(index, round = this.shownRound) {
    for (let k = round; k >= 0; k--) { // a redraw's pictures as they come, before they take the places of the old ones
      const version = this.story.redrawn[k]?.[index];
      if (version) return { address: pictureAddress(this.story.id, index, k, version, "redraw"), round: k, take: "redraw" };
    }
    for (let k = round; k >= 0; k--) {
      const version = this.story.pictures[k]?.[index];
      if (version) return { address: pictureAddress(this.story.id, index, k, version), round: k };
      if (this.round !== null) return null;
    }
    return null;
  }

  build() {
    this.heading = element("h1", { className: "text" });
    this.state = element("span", { className: "state" });
    this.actions = element("div", { className: "row actions" });
    this.bar = element("progress", { max: 1, value: 0, "aria-label": "Drawn" });
    this.pace = element("p", { className: "quiet", id: "pace" });
    this.problem = element("p", { className: "note bad text", hidden: true });
    this.notes = element("div", { className: "checks", hidden: true, id: "notes" });
    this.notesButton = button("", () => ((this.notes.hidden = !this.notes.hidden), this.showNotes()), { className: "bare unseen", "aria-controls": "notes" });
    this.slider = element("input", { type: "range", min: 0, id: "round", "aria-label": "Round", oninput: () => this.choose(Number(this.slider.value)) });
    this.roundText = element("output", {});
    this.rounds = element("div", { className: "rounds" }, [element("label", { htmlFor: "round" }, ["Round"]), this.slider, this.roundText]);
    this.grid = element("div", { className: "frames" });
    this.figures = [];
    this.main.replaceChildren(
      element("div", { className: "row spread" }, [element("div", {}, [this.heading, this.state]), this.actions]),
      element("div", { className: "pace" }, [element("div", { className: "row spread" }, [this.pace, this.notesButton]), this.bar, this.problem]),
      this.notes, this.rounds, this.grid,
      element("div", { className: "side-by-side" }, [this.takeAlong(), this.continuing(), this.given.card]),
      this.large.dialog,
    );
    this.showNotes();
    this.show();
  }

  choose(round) {
    this.round = round;
    this.show();
  }

  show() {
    const { story } = this;
    this.heading.textContent = story.name;
    this.state.textContent = STATES[story.state];
    this.state.dataset.state = story.state;
    this.problem.hidden = !story.error;
    this.problem.textContent = story.error ?? "";
    this.showActions();
    this.showPace(story.progress);
    const last = Math.max(0, story.pictures.length - 1);
    this.rounds.classList.toggle("unseen", last === 0); // its place is kept: how many rounds there are is known later
    this.slider.max = last;
    this.slider.value = this.shownRound;
    const followed = this.round === null && story.state !== "finished" ? " (newest)" : "";
    this.roundText.textContent = `${this.shownRound} of ${last}${followed}`;
    this.slider.setAttribute("aria-valuetext", `Round ${this.shownRound} of ${last}`);
    this.frames.forEach((_, index) => this.showFrame(index));
    this.figures.splice(this.frames.length).forEach((parts) => parts.figure.remove()); // an append that was stopped
    this.showTakes();
    this.goOn.disabled = this.goOnAnew.disabled = story.state !== "finished";
    this.showAppended();
    this.given.show();
    this.large.show();
  }

  /** What the user should know has a button in a place of its own: nothing moves when it comes. */
  showNotes() {
    this.notesButton.classList.toggle("unseen", !this.notes.childElementCount);
    this.notesButton.textContent = counted(this.notes.childElementCount, "note");
    this.notesButton.setAttribute("aria-expanded", String(!this.notes.hidden));
  }

  showActions() {
    const { state, redraw } = this.story;
    const act = (text, path, body, properties) => button(text, () => attempt(() => send("POST", `${this.path}/${path}`, body)), properties);
    const shown = [];
    if (state === "drawing" || state === "queued") shown.push(act("Pause", "cancel", {}, { id: "pause" }));
    if (state === "paused") shown.push(act("Go on", "draw", {}, { className: "main", id: "go-on" }));
    if (state !== "finished") shown.push(button("Stop", () => attempt(() => this.stop()), { id: "stop", title: redraw ? "The redraw is forgotten" : "It is a draft again; its pictures go to the trash folder" }));
    const key = `${state}${Boolean(redraw)}`;
    if (this.actions.dataset.key === key) return; // a button that is pressed stays what it is
    this.actions.dataset.key = key;
    this.actions.replaceChildren(...shown);
  }

  showPace(progress) {
    const drawn = this.story.pictures.reduce((sum, round) => sum + Object.keys(round).length, 0);
    const all = this.story.pictures.length * this.frames.length;
    this.bar.max = progress?.total || all || 1;
    this.bar.value = progress ? progress.finished : drawn;
    this.bar.toggleAttribute("data-done", this.story.state === "finished");
    const told = { queued: "Waits for the stories before it.", paused: "Paused: what is drawn is kept.", finished: `${counted(all, "picture")} in ${counted(this.story.pictures.length, "round")}.` };
    if (this.story.state !== "drawing" || !progress) this.pace.textContent = told[this.story.state] ?? "Opening the model …";
    else if (!progress.steps) this.pace.textContent = "Opening the model …";
    else this.pace.textContent = [`Round ${progress.round} of ${progress.rounds - 1}, step ${progress.step} of ${progress.steps}, ${progress.finished} of ${progress.total} pictures`, timeOf(progress.seconds_left)].filter(Boolean).join(", ");
  }

  figure(index) {
    const image = element("img", { alt: "", hidden: true, decoding: "async" });
    const empty = element("span", {}, [""]);
    const ratio = `${this.story.width ?? 1} / ${this.story.height ?? 1}`;
    const picture = element("span", { className: "picture" }, [empty, image]);
    picture.style.aspectRatio = ratio;
    const open = button("", () => this.large.open(index), { className: "open", "aria-label": `Frame ${index}, large` });
    open.append(picture);
    const locked = element("span", { className: "badge", hidden: true }, ["Locked"]);
    const changed = element("span", { className: "badge right", hidden: true }, ["Redraws"]);
    const text = element("span", { className: "text caption" });
    const figure = element("figure", { className: "frame", tabIndex: -1 }, [
      open, locked, changed,
      element("figcaption", {}, [element("span", { className: "number" }, [String(index)]), text]),
    ]);
    this.grid.append(figure);
    return { figure, image, empty, locked, changed, text, open, picture };
  }

  showFrame(index) {
    const parts = (this.figures[index] ??= this.figure(index));
    const found = this.picture(index);
    parts.text.textContent = this.caption(index);
    parts.image.alt = this.caption(index);
    parts.image.hidden = !found;
    parts.empty.textContent = found ? "" : "Not drawn yet";
    if (this.story.width) parts.picture.style.aspectRatio = `${this.story.width} / ${this.story.height}`;
    if (found && parts.image.getAttribute("src") !== found.address) parts.image.src = found.address;
    parts.locked.hidden = !this.isLocked(index);
    parts.figure.toggleAttribute("data-locked", this.isLocked(index));
    parts.changed.hidden = !(this.story.redraw && String(index) in this.story.redraw);
  }

  // Changes, which the large view and the keys ask for.

  async refresh() {
    this.story = await get(this.path);
    this.show();
  }

  async lock(index) {
    const locked = this.isLocked(index) ? this.story.locked.filter((i) => i !== index) : [...this.story.locked, index];
    this.story.locked = locked; // at once: a key pressed twice locks and unlocks
    this.show();
    try {
      await send("PATCH", this.path, { locked });
    } finally {
      await this.refresh();
    }
    say(`Frame ${index} is ${this.isLocked(index) ? "locked: no redraw changes it" : "unlocked"}.`);
  }

  async redraw(index, change, seed) {
    await send("POST", `${this.path}/redraw`, { frames: [{ frame: index, ...change }], ...(seed === undefined ? {} : { seed }) });
    await this.refresh();
  }

  async takeBack(number) {
    await send("POST", `${this.path}/take-back`, { number });
    await this.refresh();
  }

  /** End what is being drawn; a first drawing becomes a draft again, and the view with it. */
  async stop() {
    const { redraw } = this.story;
    await send("POST", `${this.path}/stop`);
    say(redraw ? "The redraw is forgotten; the story is as it was." : "The story is a draft again; what was drawn is in the trash folder.");
  }

  takeAlong() {
    this.takes = TAKEN.map(([name, text]) => element("a", { className: "button", download: "", dataset: { name } }, [text]));
    this.takesNote = element("p", { className: "quiet" });
    return element("section", { className: "card stack" }, [element("h2", {}, ["Take along"]), element("div", { className: "row" }, this.takes), this.takesNote]);
  }

  showTakes() {
    const { takes } = this.story;
    for (const link of this.takes) {
      const there = takes.includes(link.dataset.name);
      if (there) link.href = `${this.path}/take/${link.dataset.name}`;
      else link.removeAttribute("href");
      link.toggleAttribute("aria-disabled", !there);
    }
    const film = takes.length && !takes.includes("film.mp4") ? " A film wants ffmpeg on this machine's PATH." : "";
    this.takesNote.textContent = `${takes.length ? "" : "Once the story is finished. "}The command line: fastory render.${film}`;
  }

  continuing() {
    const text = element("textarea", { rows: 2, placeholder: "What happens next", "aria-label": "Next captions, one a line", id: "next" });
    const captions = () => text.value.split("\n").map((line) => line.trim()).filter(Boolean);
    this.goOn = button("Draw these against the rest", () => attempt(async () => {
      await send("POST", `${this.path}/append`, { captions: captions() });
      text.value = "";
      await this.refresh();
    }), { id: "append" });
    this.goOnAnew = button("All anew, in a new story", () => attempt(async () => {
      const { id } = await send("POST", `${this.path}/duplicate`);
      const copy = await get(`/stories/${id}`);
      const story = { ...copy.story, frames: [...copy.story.frames, ...captions()] };
      await send("PUT", `/stories/${id}`, { story });
      location.hash = `#/${id}`;
    }), { className: "bare" });
    this.backButtons = element("div", { className: "row", id: "appended" });
    return element("section", { className: "card stack" }, [
      element("h2", {}, ["Go on with the story"]), text, element("div", { className: "row" }, [this.goOn, this.goOnAnew]),
      element("p", { className: "quiet" }, ["A caption a line. New frames see the others, which stay as they are; in a new story all see each other."]),
      this.backButtons, // last: nothing moves when they come
    ]);
  }

  /** Frames that were appended last leave the story again, and those that left it last come back. */
  showAppended() {
    const { story } = this;
    const count = story.story.frames?.length ?? 0;
    const shown = story.undoable.flatMap((number) => {
      const appended = story.appended_by[number] ?? [];
      const gone = (story.history[number] ?? []).map(Number).filter((frame) => frame >= count);
      if (appended.length && appended.at(-1) === count - 1) return [[number, "Take", appended]];
      return gone[0] === count ? [[number, "Bring", gone]] : [];
    });
    const latest = ["Take", "Bring"].map((verb) => shown.filter((row) => row[1] === verb).at(-1)).filter(Boolean);
    const key = JSON.stringify([latest, story.locked, story.state]);
    if (this.backButtons.dataset.key === key) return; // a button that is pressed stays what it is
    this.backButtons.dataset.key = key;
    this.backButtons.replaceChildren(...latest.map(([number, verb, frames]) => button(`${verb} ${frames.length > 1 ? "frames" : "frame"} ${listed(frames)} back`,
      () => attempt(() => this.takeBack(number)), { className: "bare", disabled: story.state !== "finished" || frames.some((frame) => this.isLocked(frame)) })));
  }

  heard(event) {
    if (event.event === "Notice") this.notes.append(element("p", { className: "note warn text" }, [event.message])), this.showNotes();
    if (event.event === "StoryStarted") this.notes.replaceChildren(), this.showNotes();
    if (event.event === "StepDone" && event.progress) this.showPace(event.progress);
    if (["FrameDrawn", "StateChanged", "BatchHalved", "StoryStarted", "StoryFinished", "Listening"].includes(event.event)) this.ask();
  }

  /** Read the state anew; what comes meanwhile is read once more after. */
  ask() {
    if (this.reading) return void (this.again = true);
    this.reading = this.refresh().catch(() => {}).finally(() => {
      this.reading = undefined;
      if (this.again) (this.again = false), this.ask();
    });
  }
}

/** Keys of the grid: arrows move, Enter opens (a button does), L locks, R redraws. */
function gridKeys(run, event) {
  if (run.large.dialog.open || event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const index = run.figures.findIndex((parts) => parts.figure.contains(document.activeElement));
  const columns = getComputedStyle(run.grid).gridTemplateColumns.split(" ").length;
  const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
  if (by !== undefined && (index >= 0 || by > 0)) {
    const to = index < 0 ? 0 : index + by;
    if (!run.figures[to]) return;
    event.preventDefault();
    run.figures[to].open.focus();
  } else if (index >= 0 && event.key.toLowerCase() === "l") attempt(() => run.lock(index));
  else if (index >= 0 && event.key.toLowerCase() === "r") attempt(() => run.large.anotherTake(index));
}

export async function showRun(main, story) {
  const run = new Run(main, story);
  const keys = (event) => gridKeys(run, event);
  addEventListener("keydown", keys);
  const end = listen(story.id, (event) => run.heard(event));
  return () => (end(), removeEventListener("keydown", keys), run.large.close());
}
