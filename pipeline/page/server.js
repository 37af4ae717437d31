// Answers come from the server that the page came from, over OpenAI's interface.
const headers = () => $("key").value ? { Authorization: "Bearer " + $("key").value } : {};
const engine = {
  failed: () => "the server does not answer",

  async name() {
    const response = await fetch("v1/models", { headers: headers() });
    return response.ok ? (await response.json()).data[0].id : "edgepress: give the API key in the settings";
  },

  async *answer(messages, { temperature, limit }, signal) {
    const body = { messages, stream: true, stream_options: { include_usage: true } };
    if (temperature !== null) body.temperature = temperature;
    if (limit !== null) body.max_tokens = limit;
    const response = await fetch("v1/chat/completions", {
      method: "POST", signal, headers: { "Content-Type": "application/json", ...headers() }, body: JSON.stringify(body),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", tokens = null, reason = null;
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (!part.startsWith("data: ") || part === "data: [DONE]") continue;
        const content = JSON.parse(part.slice(6));
        if (content.error) throw new Error(content.error.message);
        tokens = content.usage?.completion_tokens ?? tokens;
        reason = content.choices[0]?.finish_reason ?? reason;
        if (content.choices[0]?.delta?.content) yield content.choices[0].delta.content;
      }
    }
    if (!reason) throw new Error("the server ended the answer");
    return { reason, tokens };
  },
};
$("key").addEventListener("change", name);
