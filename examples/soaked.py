COLUMNS = ("time", "service", "role", "process", "age", "rss", "handles", "threads", "processor")
def main(folder):
    print("later")
