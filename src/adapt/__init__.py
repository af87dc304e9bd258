"""Fine-tuning a part of a model: adapters beside frozen weights, tuned initial states, a quantised frozen base."""
