"""Skill localization on real tasks: which small part of a fine-tuned model carries the skill."""
