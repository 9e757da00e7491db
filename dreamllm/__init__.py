"""DreamLLM: a language model that understands and creates pictures, trained and served on dreamkernels."""
