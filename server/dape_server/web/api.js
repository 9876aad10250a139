// Requests to the server: the key, errors in words, server-sent events.

const STORE = "dape-key";
let key = sessionStorage.getItem(STORE) ?? "";

export function setKey(value) {
  key = value.trim();
  if (key) sessionStorage.setItem(STORE, key);
  else sessionStorage.removeItem(STORE);
}

export const hasKey = () => key !== "";

/** A refusal or failure; `message` is fit to be shown. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

export const get = async (path) => (await request(path)).json();
export const post = async (path, body, signal) => (await request(path, { body, signal })).json();

/** Yield the JSON values of an event stream; an error event becomes an ApiError. */
export async function* events(path, body, signal) {
  const response = await request(path, { body, signal });
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, "The connection was lost before the answer was complete.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue; // a comment that keeps the connection alive
      const item = JSON.parse(data);
      if (item.error) throw new ApiError(response.status, sentence(item.error.message));
      yield item;
    }
  }
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch {
    // Something between the page and the server has answered.
  }
  if (response.status === 401) {
    document.dispatchEvent(new CustomEvent("key-needed"));
    message = key ? "The server does not accept this API key." : "This server wants an API key. Enter it at the top of the page.";
  } else if (response.status === 429 || response.status === 503) {
    const after = response.headers.get("Retry-After");
    if (after) message += ` Try again in ${after} s.`;
  }
  return new ApiError(response.status, message);
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

/** The numbers of a base64 text of little-endian float32 values. */
export function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}
