"""What drafts are made of: norm, rotary embedding, linear maps, attention, MLP."""
