"""What is fastest on a device: ``table`` keeps it and puts it to use, ``search`` finds it by what ``timing`` times."""
