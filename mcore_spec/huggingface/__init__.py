"""Drafts on transformers models as their users know them: save_pretrained, save and restore, export."""
