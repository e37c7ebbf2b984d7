// What a web page can try to reach a daemon on its reader's machine, and what it learns. `base` is the origin it
// aims at, `path` a path that would start a guest, or one that would tell it something.
async function attack(base, path) {
  const url = base + path, learned = {};
  const within = (ms, promise) => Promise.race([promise, new Promise(done => setTimeout(() => done("nothing"), ms))]);
  const told = async (name, request) => {
    try {
      const answer = await within(3000, request());
      if (answer === "nothing") learned[name] = "nothing";
      else if (answer instanceof Response && answer.type !== "opaque") learned[name] = `${answer.status} ${await answer.text()}`;
      else learned[name] = answer instanceof Response ? "nothing" : `${answer}`;
    } catch { learned[name] = "nothing"; }
  };
  const added = (name, fields, settled) => within(3000, new Promise(done => {
    const made = Object.assign(document.createElement(name), fields);
    made.onload = () => done(settled(made));
    made.onerror = () => done("nothing");
    document.body.append(made);
  }));
  const framed = frame => {
    try { return frame.contentDocument?.body?.innerText || "nothing"; } catch { return "nothing"; }
  };

  const plain = {"content-type": "text/plain"};
  await told("simple post", () => fetch(url, {method: "POST", headers: plain, body: "x"}));
  await told("opaque post", () => fetch(url, {method: "POST", mode: "no-cors", body: "x"}));
  await told("post that outlives its page", () => fetch(url, {method: "POST", mode: "no-cors", keepalive: true, body: "x"}));
  await told("post with credentials", () => fetch(url, {method: "POST", credentials: "include", body: "x"}));
  await told("preflight for json", () => fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body: "{}"}));
  await told("preflight for a header", () => fetch(url, {method: "POST", headers: {"fc-session": "s"}, body: "x"}));
  await told("preflight for a method", () => fetch(url, {method: "PUT", body: "x"}));
  await told("simple get", () => fetch(url));
  await told("opaque get", () => fetch(url, {mode: "no-cors"}));
  await told("beacon", async () => { navigator.sendBeacon(url, "x"); return "nothing"; });
  await told("image", () => added("img", {src: url}, made => `an image of ${made.width} pixels`));
  await told("script", () => added("script", {src: url}, () => "a script"));
  await told("module", () => import(url).then(() => "a module"));
  await told("style sheet", () => added("link", {rel: "stylesheet", href: url}, made => `${made.sheet?.cssRules.length} rules`));
  await told("frame", () => added("iframe", {src: url}, framed));
  await told("object", () => added("object", {data: url}, framed));
  await told("events", () => new Promise(done => {
    const source = new EventSource(url);
    source.onopen = source.onmessage = () => done("events");
    source.onerror = () => { source.close(); done("nothing"); };
  }));
  await told("web socket", () => new Promise(done => {
    const socket = new WebSocket(url.replace("http", "ws"));
    socket.onopen = () => done("a socket");
    socket.onerror = () => done("nothing");
  }));
  for (const enctype of ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
    await told(`form as ${enctype}`, () => {
      const target = `frame-${Math.random()}`, frame = Object.assign(document.createElement("iframe"), {name: target});
      document.body.append(frame);
      const form = Object.assign(document.createElement("form"), {action: url, method: "post", enctype, target});
      form.append(Object.assign(document.createElement("input"), {name: "x", value: "x"}));
      document.body.append(form);
      form.submit();
      return within(3000, new Promise(done => { frame.onload = () => done(framed(frame)); }));
    });
  return learned;
}
