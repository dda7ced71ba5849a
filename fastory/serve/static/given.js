// Pictures that a drawn story is given: what is drawn next goes by them.

import { send } from "./api.js";
import { dropZone } from "./drop.js";
import { button, element } from "./element.js";
import { attempt, say } from "./say.js";

const named = (frames) => `${frames.length === 1 ? "frame" : "frames"} ${frames.join(", ")}`;

/** The card of a run's view. It is shown where the run's mode reads such pictures. */
export class Given {
  constructor(run) {
    this.run = run;
    this.zones = element("div", { className: "stack" });
    this.note = element("p", { className: "quiet", role: "status" });
    this.buttons = element("div", { className: "row" });
    this.card = element("section", { className: "card stack", id: "given", hidden: true }, [element("h2", {}, ["Pictures"]), this.zones, this.note, this.buttons]);
  }

  show() {
    const { story } = this.run;
    const characters = Object.entries(story.story.characters ?? {});
    const readsFirst = story.reads.includes("first_frame");
    this.card.hidden = !readsFirst && !(story.reads.includes("references") && characters.length);
    const key = JSON.stringify([story.state, story.story.characters, story.story.first_frame, story.reads, story.next_pictures, story.recast, story.locked]);
    if (this.card.hidden || this.key === key) return; // a button that is pressed stays what it is
    this.key = key;
    this.zones.replaceChildren(...(readsFirst ? [this.firstFrame()] : characters.map(([name, entry]) => this.person(name, entry))));
    this.showNext();
  }

  person(name, entry) {
    const names = this.run.story.next_pictures?.references[name] ?? entry?.references ?? [];
    const put = (references) => this.keep({ references: { ...this.run.story.next_pictures?.references, [name]: references } });
    const zone = this.zone(names, `A picture of ${name}`, "Add pictures", true, (uploaded) => put([...names, ...uploaded]));
    if (names.length) zone.append(button("None", () => attempt(() => put([])), { className: "bare", "aria-label": `No pictures of ${name}` }));
    return element("div", {}, [element("span", { className: "label text" }, [name]), zone]);
  }

  firstFrame() {
    const now = this.run.story.next_pictures?.first_frame ?? this.run.story.story.first_frame;
    const zone = this.zone(now ? [now] : [], "The first frame", now ? "Another picture" : "Choose a picture", false, ([name]) => this.keep({ first_frame: name }));
    return element("div", {}, [element("span", { className: "label" }, ["First frame: a picture that the story goes on from"]), zone]);
  }

  zone(names, alt, label, many, taken) {
    const zone = dropZone(this.run.path, { names, alt, label, many, taken });
    zone.inert = this.run.story.state !== "finished";
    return zone;
  }

  async keep(pictures) {
    await send("PATCH", this.run.path, { pictures });
    await this.run.refresh();
    const { next_pictures: next } = this.run.story;
    say(next ? "What is drawn next goes by these pictures." : "The story's own pictures count.");
  }

  /** Which frames are redrawn, and which stay. */
  showNext() {
    const { story } = this.run;
    const finished = story.state === "finished";
    const frames = story.next_pictures?.frames ?? story.recast;
    const open = frames.filter((frame) => !story.locked.includes(frame));
    const wholly = story.next_pictures?.first_frame && open.length < frames.length; // all go on from it: none can stay
    const was = frames.length === 1 ? "was" : "were";
    const what = story.next_pictures ? `${was} drawn with the pictures of before` : `${was} drawn before the story had these pictures`;
    const stays = frames.length > open.length ? `; ${wholly ? "unlock all to redraw them" : "locked ones stay as they are"}` : "";
    this.note.textContent = frames.length ? `${named(frames).replace("f", "F")} ${what}${stays}.` : story.next_pictures ? "No frame shows who they are of." : "What is dropped here counts in what is drawn next.";
    const redraw = button(`Redraw ${named(open)}`, () => attempt(async () => {
      await send("POST", `${this.run.path}/redraw`, { frames: open.map((frame) => ({ frame })) });
      await this.run.refresh();
    }), { className: "main", id: "redraw-given", disabled: !finished || wholly });
    const before = button("As before", () => attempt(() => this.keep({})), { className: "bare", disabled: !finished });
    this.buttons.replaceChildren(...(open.length ? [redraw] : []), ...(story.next_pictures ? [before] : []));
  }
}
