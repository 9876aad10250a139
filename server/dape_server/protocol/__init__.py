"""Bodies of requests and answers, as pydantic models. Importing this package runs nothing."""
