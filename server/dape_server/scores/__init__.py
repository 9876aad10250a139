"""A perplexity request from its inputs to its answer: inputs, plan, run, report."""
