"""The vault: who may ask for what, and the record of who changed what."""
