// What a web page can try to reach a daemon on its reader's machine, and what it learns. `base` is the origin it
// aims at, `path` a path that would start a guest, or one that would tell it something.
async function attack(base, path) {
  const url = base + path, learned = {}, tried = [];
  const within = (ms, promise) => Promise.race([promise, new Promise(done => setTimeout(() => done("nothing"), ms))]);
  const answered = async (name, request) => {
    try {
      const answer = await within(3000, request());
      if (answer === "nothing") learned[name] = "nothing";
      else if (answer instanceof Response && answer.type !== "opaque") learned[name] = `${answer.status} ${await answer.text()}`;
      else learned[name] = answer instanceof Response ? "nothing" : `${answer}`;
    } catch { learned[name] = "nothing"; }
  };
  const told = (name, request) => tried.push(answered(name, request));
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
  told("simple post", () => fetch(url, {method: "POST", headers: plain, body: "x"}));
  told("opaque post", () => fetch(url, {method: "POST", mode: "no-cors", body: "x"}));
  told("post that outlives its page", () => fetch(url, {method: "POST", mode: "no-cors", keepalive: true, body: "x"}));
  told("post with credentials", () => fetch(url, {method: "POST", credentials: "include", body: "x"}));
  told("preflight for json", () => fetch(url, {method: "POST", headers: {"content-type": "application/json"}, body: "{}"}));
  told("preflight for a header", () => fetch(url, {method: "POST", headers: {"fc-session": "s"}, body: "x"}));
  told("preflight for a method", () => fetch(url, {method: "PUT", body: "x"}));
  told("simple get", () => fetch(url));
  told("opaque get", () => fetch(url, {mode: "no-cors"}));
  told("beacon", async () => { navigator.sendBeacon(url, "x"); return "nothing"; });
  told("image", () => added("img", {src: url}, made => `an image of ${made.width} pixels`));
  told("script", () => added("script", {src: url}, () => "a script"));
  told("module", () => import(url).then(() => "a module"));
  told("style sheet", () => added("link", {rel: "stylesheet", href: url}, made => `${made.sheet?.cssRules.length} rules`));
  told("frame", () => added("iframe", {src: url}, framed));
  told("object", () => added("object", {data: url}, framed));
  told("events", () => new Promise(done => {
    const source = new EventSource(url);
    source.onopen = source.onmessage = () => done("events");
    source.onerror = () => { source.close(); done("nothing"); };
  }));
  told("web socket", () => new Promise(done => {
    const socket = new WebSocket(url.replace("http", "ws"));
    socket.onopen = () => done("a socket");
    socket.onerror = () => done("nothing");
  }));
  for (const enctype of ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
    told(`form as ${enctype}`, () => {
      const target = `frame-${Math.random()}`, frame = Object.assign(document.createElement("iframe"), {name: target});
      document.body.append(frame);
      const form = Object.assign(document.createElement("form"), {action: url, method: "post", enctype, target});
      form.append(Object.assign(document.createElement("input"), {name: "x", value: "x"}));
      document.body.append(form);
      form.submit();
      return within(3000, new Promise(done => { frame.onload = () => done(framed(frame)); }));
    });
  await Promise.all(tried);
  return learned;
}
