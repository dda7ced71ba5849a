// Requests to the server, and what happens there as it happens.

/** An error in the server's words; status 0 where it cannot be reached. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function answered(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Refused("The server does not answer. What is drawn is kept; start fastory serve again.", 0);
  }
  const body = await response.json();
  if (!response.ok) throw new Refused(body.error, response.status);
  return body;
}

export const get = (path) => answered(path, {});

export const send = (method, path, body) =>
  answered(path, {
    method,
    headers: { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });

export const upload = (path, file) => answered(path, { method: "POST", body: file });

/** Calls `heard` with every event of a story, or of all under "". Returns what ends it. */
export function listen(story, heard) {
  const source = new EventSource(story ? `/stories/${story}/events` : "/events");
  source.onmessage = (message) => heard(JSON.parse(message.data));
  return () => source.close();
}

export function pictureAddress(story, frame, round, version, take) {
  const more = take ? `&take=${take}` : "";
  return `/stories/${story}/frames/${frame}?round=${round}${more}&v=${version ?? ""}`;
}
