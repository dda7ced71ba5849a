// The OpenAPI document as a page: each route with what it takes and what it answers.

import { element } from "./element.js";

function bodyOf(route) {
  const content = Object.entries(route.requestBody?.content ?? {});
  return content.map(([type, { schema }]) =>
    element("details", {}, [
      element("summary", {}, [`body: ${type}`]),
      element("pre", {}, [JSON.stringify(schema, null, 2)]),
    ]),
  );
}

function parameters(route) {
  const named = (route.parameters ?? []).filter((parameter) => parameter.in !== "header");
  return named.map((parameter) =>
    element("li", {}, [`${parameter.name} (${parameter.in}${parameter.required ? "" : ", optional"})`]),
  );
}

function answers(route) {
  const codes = Object.keys(route.responses).filter((code) => code < "300");
  return element("p", { className: "quiet" }, [`answers ${codes.join(", ")}`]);
}

const described = await (await fetch("/openapi.json")).json();
const routes = Object.entries(described.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, route]) =>
    element("article", { className: "route" }, [
      element("h2", {}, [element("code", {}, [`${method.toUpperCase()} ${path}`])]),
      element("p", {}, [route.summary ?? ""]),
      element("ul", {}, parameters(route)),
      ...bodyOf(route),
      answers(route),
    ]),
  ),
);
document.getElementById("routes").replaceChildren(...routes);
