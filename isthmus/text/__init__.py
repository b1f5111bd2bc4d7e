"""Between text and token ids: tokenizer, chat template, detokenizer, and when a sequence of tokens ends. No torch."""
