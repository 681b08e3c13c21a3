"""Views: choose documents of finished sets, then limit, pack and order them anew, without a tokenizer."""
