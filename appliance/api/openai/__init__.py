"""The OpenAI API, one file a resource. Protocol: https://platform.openai.com/docs/api-reference."""
