"""The inference engine: model, paged cache, scheduler, sampling and scoring."""
