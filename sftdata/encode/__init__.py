"""Text to token ids: the tokenizer, the engines that encode, and where each token lies in the text."""
