"""An artifact behind OpenAI's HTTP interface, with a page to chat: what an application asks for becomes tokens of the runtime."""
