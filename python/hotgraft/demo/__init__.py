"""The demo: two real skills on a pretrained encoder, and how they were made."""
