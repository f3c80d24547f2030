"""An HTTP server that speaks OpenAI's API: who is served, what a request means, how an answer is written."""
