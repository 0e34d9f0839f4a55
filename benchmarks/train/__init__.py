"""Training scripts, FishLeg beside AdamW."""
